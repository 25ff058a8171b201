// nibble logits: the raw numbers behind the next token.

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "base/error.h"
#include "nibble/commands.h"
#include "nibble/input.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

struct LogitsOptions {
  ModelOptions model;
  std::string ids;
  uint32_t last = 1;
  std::string out;
};

void write_rows(const LogitsOptions& options, std::span<const TokenId> tokens,
                engine::Engine& engine, std::ofstream& out) {
  const std::unique_ptr<engine::Session> session = engine.new_session();
  const CatchInterrupt interruptible(*session);
  ProgressBar bar;
  const size_t rows = std::min<size_t>(options.last, tokens.size());
  if (rows < tokens.size()) {
    session->extend(tokens.first(tokens.size() - rows), 0, bar.callback());
    tokens = tokens.last(rows);
  }
  while (!tokens.empty()) {
    const size_t chunk = std::min<size_t>(tokens.size(), logit_rows_at_once(engine));
    session->extend(tokens.first(chunk), uint32_t(chunk));
    tokens = tokens.subspan(chunk);
    const std::span<const float> logits = session->logits();
    out.write(reinterpret_cast<const char*>(logits.data()), std::streamsize(logits.size_bytes()));
    bar.update("logits", rows - tokens.size(), rows);
  }
}

void logits(const LogitsOptions& options) {
  const std::vector<TokenId> tokens = parse_ids(options.ids);
  engine::EngineOptions engine_options = options.model.engine_options();
  prefer_exact_kv(engine_options);
  const OpenModel model = open_model(options.model, engine_options);

  std::ofstream out(options.out, std::ios::binary);
  if (!out) fail(ErrorCode::kIo, "{}: can't write: {}", options.out, strerror(errno));
  write_rows(options, tokens, *model.engine, out);
  out.close();
  if (!out) fail(ErrorCode::kIo, "{}: can't write: {}", options.out, strerror(errno));
  fmt::print(stderr, "{}: {} rows of {} float32\n", options.out,
             std::min<size_t>(options.last, tokens.size()), model.engine->plan().vocabulary);
}

}  // namespace

void add_logits(CLI::App& app) {
  auto options = std::make_shared<LogitsOptions>();
  CLI::App* command = app.add_subcommand("logits", "Write the logits after given tokens");
  options->model.add_to(*command);
  options->model.add_context_to(*command);
  command->add_option("--ids", options->ids, "The tokens, separated by commas")
      ->required()
      ->type_name("ID,ID,...");
  command->add_option("--last", options->last, "Of how many of the last positions; left out: 1")
      ->check(finite_between(1, INT32_MAX))
      ->type_name("K");
  command
      ->add_option("--out", options->out,
                   "File for the rows [K, vocabulary], raw float32 in this machine's byte order")
      ->required()
      ->type_name("FILE");
  command->footer(
      "No BOS is added. The KV cache is f32 (on CUDA f16) unless --kv says otherwise.\n"
      "Example:\n"
      "  nibble logits model.gguf --ids 2,5,525,274 --last 2 --out rows.f32");
  command->callback([options] { logits(*options); });
}

}  // namespace nibble::app
