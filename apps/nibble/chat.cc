// nibble chat: a conversation.

#include <editline/readline.h>
#include <fmt/format.h>

#include <cstdlib>
#include <iostream>
#include <memory>

#include "base/error.h"
#include "nibble/commands.h"
#include "nibble/generation.h"
#include "nibble/input.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

struct ChatOptions {
  ModelOptions model;
  SamplingOptions sampling;
  std::optional<std::string> system;
  std::optional<uint32_t> max_tokens;
  bool think = false;
};

constexpr std::string_view kHelp =
    "/help          this list\n"
    "/clear         forget the conversation\n"
    "/system TEXT   set the instructions that stand before it, and forget it\n"
    "/think         let the model think before it answers, or stop that\n"
    "/retry         answer the last question again\n"
    "/quit          leave; so does Ctrl-D\n"
    "Ctrl-C stops an answer.\n";

// The next line that the user types; nullopt at the end of input.
std::optional<std::string> read_line() {
  if (!stdin_is_terminal()) {
    std::string line;
    if (!std::getline(std::cin, line)) return std::nullopt;
    return line;
  }
  const std::unique_ptr<char, decltype(&std::free)> line(::readline("> "), &std::free);
  if (!line) {
    fmt::print(stderr, "\n");  // the shell's prompt gets a line of its own
    return std::nullopt;
  }
  if (*line) ::add_history(line.get());
  return std::string(line.get());
}

class Chat {
 public:
  Chat(engine::Engine& engine, const text::ChatFormat& format, const ChatOptions& options)
      : engine_(engine),
        format_(format),
        session_(engine.new_session()),
        sampling_(options.sampling.resolve(engine)),
        max_tokens_(options.max_tokens),
        system_(options.system.value_or("")),
        think_(options.think),
        verbose_(options.model.verbose) {}

  void talk() {
    while (const std::optional<std::string> line = read_line()) {
      if (line->find_first_not_of(" \t\r") == std::string::npos) continue;
      if (line->front() != '/') {
        ask(*line);
      } else if (!obey(*line)) {
        return;
      }
    }
  }

 private:
  // Whether to go on.
  bool obey(const std::string& line) {
    const size_t space = line.find(' ');
    const std::string command = line.substr(0, space);
    const std::string argument = space == std::string::npos ? "" : line.substr(space + 1);
    if (command == "/quit") return false;
    if (command == "/help") {
      fmt::print(stderr, "{}", kHelp);
    } else if (command == "/clear") {
      turns_.clear();
    } else if (command == "/system") {
      system_ = argument;
      turns_.clear();
    } else if (command == "/think") {
      think_ = !think_;
      fmt::print(stderr, "thinking is {}{}\n", think_ ? "on" : "off",
                 format_.can_think() ? "" : ", but this model has no thought channel");
    } else if (command == "/retry") {
      retry();
    } else {
      fmt::print(stderr, "{} is no command; /help lists them\n", printable(command));
    }
    return true;
  }

  void retry() {
    if (turns_.empty()) {
      fmt::print(stderr, "nothing was asked yet\n");
      return;
    }
    turns_.pop_back();
    const std::string question = std::move(turns_.back().text);
    turns_.pop_back();
    ++sampling_.seed;  // the same draw would give the same answer
    ask(question);
  }

  void ask(const std::string& question) {
    turns_.push_back({text::Role::kUser, question});
    std::vector<text::Message> messages;
    if (!system_.empty()) messages.push_back({text::Role::kSystem, system_});
    messages.insert(messages.end(), turns_.begin(), turns_.end());
    try {
      session_->set_sampling(sampling_);
      AnswerPrinter printer(think_);
      const std::vector<TokenId> prompt = format_.encode(messages, think_);
      const Answer answer = generate(engine_, *session_, prompt, max_tokens_,
                                     [&](const auto& piece) { printer.print(piece); });
      printer.finish();
      if (verbose_) print_statistics(answer, prompt.size(), sampling_.seed);
      turns_.push_back({text::Role::kModel, answer.text});
      if (answer.finish == Finish::kLength) {
        fmt::print(stderr, "(cut off: {})\n",
                   session_->tokens().size() == engine_.context() ? "the context is full"
                                                                  : "-n was reached");
      }
    } catch (const Error& error) {
      turns_.pop_back();  // the conversation stands as before the question
      session_->reset();
      fmt::print(stderr, "nibble: {}\n", printable(error.what()));
      if (error.code() == ErrorCode::kContextFull) {
        fmt::print(stderr, "/clear forgets the conversation and makes room\n");
      }
    }
  }

  engine::Engine& engine_;
  const text::ChatFormat& format_;
  std::unique_ptr<engine::Session> session_;
  backend::SamplingParams sampling_;
  const std::optional<uint32_t> max_tokens_;
  std::string system_;
  bool think_;
  const bool verbose_;
  std::vector<text::Message> turns_;  // user and model in turn, a model's last
};

void chat(const ChatOptions& options) {
  engine::EngineOptions engine_options = options.model.engine_options();
  engine_options.snapshots = engine::kTurnSnapshots;
  const OpenModel model = open_model(options.model, engine_options);
  require_tokenizer(*model.engine);
  const text::ChatFormat* format = model.engine->chat_format();
  if (format == nullptr) {
    fail(ErrorCode::kUnsupported,
         "this file's vocabulary has no turn markers that Nibble knows, so it can't chat; `nibble "
         "run --raw` continues plain text");
  }
  Chat chat(*model.engine, *format, options);
  if (stdin_is_terminal()) fmt::print(stderr, "/help lists the commands, Ctrl-D leaves\n");
  chat.talk();
}

}  // namespace

void add_chat(CLI::App& app) {
  auto options = std::make_shared<ChatOptions>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model");
  options->model.add_to(*command);
  options->model.add_context_to(*command);
  command
      ->add_option("--system", options->system, "Instructions that stand before the conversation")
      ->type_name("TEXT");
  command
      ->add_option("-n,--max-tokens", options->max_tokens,
                   "Most tokens of one answer; left out: until the model ends its turn")
      ->check(finite_between(1, INT32_MAX))
      ->type_name("N");
  command->add_flag("--think", options->think, "Let the model think first, and show it");
  options->sampling.add_to(*command);
  command->footer("Inside the conversation:\n" + std::string(kHelp) +
                  "Examples:\n"
                  "  nibble chat\n"
                  "  nibble chat model.gguf --system 'You are a patient teacher.'");
  command->callback([options] { chat(*options); });
}

}  // namespace nibble::app
