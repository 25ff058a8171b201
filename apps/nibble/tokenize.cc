// nibble tokenize: text -> token ids.

#include <fmt/format.h>

#include "nibble/commands.h"
#include "nibble/input.h"
#include "nibble/model_options.h"

namespace nibble::app {
namespace {

struct TokenizeOptions {
  std::string model;
  bool no_special = false;
  bool bos = false;
  bool json = false;
};

void tokenize(const TokenizeOptions& options) {
  const std::unique_ptr<const text::Tokenizer> tokenizer = open_tokenizer(options.model);
  std::vector<TokenId> tokens = tokenizer->encode(
      read_stdin(), options.no_special ? text::Specials::kText : text::Specials::kParse);
  if (options.bos && tokenizer->bos()) tokens.insert(tokens.begin(), *tokenizer->bos());

  std::string line;
  for (const TokenId token : tokens) {
    if (!line.empty()) line += options.json ? "," : " ";
    line += std::to_string(token.value);
  }
  if (options.json) line = "[" + line + "]";
  fmt::print("{}\n", line);
}

}  // namespace

void add_tokenize(CLI::App& app) {
  auto options = std::make_shared<TokenizeOptions>();
  CLI::App* command = app.add_subcommand("tokenize", "Turn text on stdin into token ids");
  add_model(*command, options->model);
  command->add_flag("--no-special", options->no_special,
                    "Text that spells a special token stays text");
  command->add_flag("--bos", options->bos, "Put the beginning-of-sequence token in front");
  command->add_flag("--json", options->json, "Print one JSON array");
  command->footer(
      "All of stdin counts, its last newline too.\n"
      "Example:\n"
      "  printf 'a harbour' | nibble tokenize");
  command->callback([options] { tokenize(*options); });
}

}  // namespace nibble::app
