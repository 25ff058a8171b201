// nibble run: one prompt, one answer.

#include <fmt/format.h>

#include "base/error.h"
#include "nibble/commands.h"
#include "nibble/generation.h"
#include "nibble/input.h"
#include "nibble/json.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

struct RunOptions {
  ModelOptions model;
  SamplingOptions sampling;
  std::optional<std::string> prompt, file, system;
  std::optional<uint32_t> max_tokens;
  bool raw = false;
  bool think = false;
  bool json = false;
};

std::string read_prompt(const RunOptions& options) {
  if (options.prompt) return *options.prompt;
  if (options.file) return read_file(*options.file);
  if (stdin_is_terminal()) throw CLI::ValidationError("a prompt is needed: -p TEXT or -f FILE");
  return read_stdin();
}

std::vector<TokenId> encode(const RunOptions& options, const std::string& prompt,
                            const engine::Engine& engine) {
  const text::Tokenizer& tokenizer = require_tokenizer(engine);
  if (options.raw) {
    std::vector<TokenId> tokens = tokenizer.encode(prompt, text::Specials::kParse);
    if (tokenizer.bos() && (tokens.empty() || tokens.front() != *tokenizer.bos())) {
      tokens.insert(tokens.begin(), *tokenizer.bos());
    }
    if (tokens.empty()) fail(ErrorCode::kInvalidArgument, "the prompt is empty");
    return tokens;
  }
  const text::ChatFormat* format = engine.chat_format();
  if (format == nullptr) {
    fail(ErrorCode::kUnsupported,
         "this file's vocabulary has no turn markers that Nibble knows, so it can't be asked in "
         "turns; with --raw it continues the prompt as plain text");
  }
  if (options.think && !format->can_think()) {
    fmt::print(stderr, "--think: this model has no thought channel, it answers at once\n");
  }
  std::vector<text::Message> messages;
  if (options.system) messages.push_back({text::Role::kSystem, *options.system});
  messages.push_back({text::Role::kUser, prompt});
  return format->encode(messages, options.think);
}

boost::json::object to_json(const Answer& answer, const RunOptions& options, size_t prompt_tokens,
                            uint64_t seed, const OpenModel& model) {
  boost::json::array tokens;
  for (const TokenId token : answer.tokens) tokens.push_back(token.value);
  boost::json::object json{{"text", answer.text}};
  if (options.think) json["thought"] = answer.thought;
  json["tokens"] = std::move(tokens);
  json["prompt_tokens"] = prompt_tokens;
  json["finish_reason"] = answer.finish == Finish::kStop ? "stop" : "length";
  json["seed"] = seed;
  json["timings"] = {{"load_ms", model.load_ms},
                     {"prefill_ms", answer.prefill_ms},
                     {"decode_ms", answer.decode_ms},
                     {"decode_tokens_per_s", answer.decode_tokens_per_s()}};
  json["backend"] = model.engine->backend().description();
  return json;
}

void run(const RunOptions& options) {
  const std::string prompt = read_prompt(options);
  const OpenModel model = open_model(options.model, options.model.engine_options());
  engine::Engine& engine = *model.engine;
  const std::vector<TokenId> tokens = encode(options, prompt, engine);
  const backend::SamplingParams sampling = options.sampling.resolve(engine);
  const std::unique_ptr<engine::Session> session = engine.new_session();
  session->set_sampling(sampling);

  // What a raw prompt continues with is all text, whatever channels it opens.
  AnswerPrinter printer(options.think || options.raw);
  const Answer answer =
      generate(engine, *session, tokens, options.max_tokens, [&](const auto& piece) {
        if (!options.json) printer.print(piece);
      });
  if (!options.json) printer.finish();
  if (answer.finish == Finish::kCancelled) fail(ErrorCode::kCancelled, "stopped by Ctrl-C");
  if (options.json) {
    const auto json = to_json(answer, options, tokens.size(), sampling.seed, model);
    fmt::print("{}\n", to_text(json));
  }
  if (options.model.verbose) print_statistics(answer, tokens.size(), sampling.seed);
}

}  // namespace

void add_run(CLI::App& app) {
  auto options = std::make_shared<RunOptions>();
  CLI::App* command = app.add_subcommand("run", "Answer one prompt");
  options->model.add_to(*command);
  options->model.add_context_to(*command);
  CLI::Option* prompt = command->add_option("-p,--prompt", options->prompt, "The prompt");
  prompt->type_name("TEXT");
  command->add_option("-f,--file", options->file, "Read the prompt from a file")
      ->type_name("FILE")
      ->excludes(prompt);
  command
      ->add_option("-n,--max-tokens", options->max_tokens,
                   "Most tokens to generate; left out: until the model ends or the context is full")
      ->check(finite_between(0, INT32_MAX))
      ->type_name("N");
  CLI::Option* system =
      command->add_option("--system", options->system, "Instructions that stand before the prompt");
  system->type_name("TEXT");
  command
      ->add_flag("--raw", options->raw,
                 "Continue the prompt as it is: no turns around it, special tokens recognised")
      ->excludes(system);
  command->add_flag("--think", options->think, "Let the model think first, and show it");
  command->add_flag("--json", options->json, "Print text, tokens and timings as JSON when done");
  options->sampling.add_to(*command);
  command->footer(
      "Without -p and -f the prompt is read from stdin. Ctrl-C stops the answer.\n"
      "Examples:\n"
      "  nibble run -p 'What does \"harbour\" mean?'\n"
      "  nibble run model.gguf -f letter.txt --system 'Answer in one sentence.' -n 100\n"
      "  git diff | nibble run model.gguf --temp 0\n"
      "  nibble run model.gguf --raw -p 'Once upon a time' --seed 7");
  command->callback([options] { run(*options); });
}

}  // namespace nibble::app
