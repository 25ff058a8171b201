// nibble detokenize: token ids -> text.

#include <CLI/CLI.hpp>
#include <boost/json.hpp>
#include <cstdio>
#include <sstream>

#include "base/error.h"
#include "nibble/commands.h"
#include "nibble/input.h"
#include "nibble/model_options.h"

namespace nibble::app {
namespace {

[[noreturn]] void fail_on(std::string_view word) {
  fail(ErrorCode::kInvalidArgument, "\"{}\" on stdin is no token id", word.substr(0, 40));
}

std::vector<TokenId> parse_json_ids(const std::string& text) {
  boost::system::error_code error;
  const boost::json::value parsed = boost::json::parse(text, error);
  if (error) fail(ErrorCode::kInvalidArgument, "stdin is no JSON array: {}", error.message());
  std::vector<TokenId> ids;
  for (const boost::json::value& element : parsed.as_array()) {
    const auto* id = element.if_int64();
    if (id == nullptr || *id < 0 || *id > INT32_MAX) fail_on(boost::json::serialize(element));
    ids.push_back({int32_t(*id)});
  }
  return ids;
}

std::vector<TokenId> parse_plain_ids(const std::string& text) {
  std::istringstream stream(text);
  std::vector<TokenId> ids;
  for (std::string word; stream >> word;) {
    TokenId id;
    if (!CLI::detail::lexical_cast(word, id.value)) fail_on(word);
    ids.push_back(id);
  }
  return ids;
}

void detokenize(const std::string& model) {
  const std::unique_ptr<const text::Tokenizer> tokenizer = open_tokenizer(model);
  const std::string input = read_stdin();
  const size_t start = input.find_first_not_of(" \t\r\n");
  const bool json = start != std::string::npos && input[start] == '[';
  // Piece by piece, not decode(): the exact bytes, also where they are no UTF-8.
  std::string text;
  for (const TokenId id : json ? parse_json_ids(input) : parse_plain_ids(input)) {
    text += tokenizer->piece(id);
  }
  std::fwrite(text.data(), 1, text.size(), stdout);
}

}  // namespace

void add_detokenize(CLI::App& app) {
  auto model = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("detokenize", "Turn token ids on stdin into text");
  add_model(*command, *model);
  command->footer(
      "Ids are separated by spaces or newlines, or are one JSON array. What `tokenize` made comes\n"
      "back byte for byte, special tokens spelled out.\n"
      "Example:\n"
      "  printf 'a harbour' | nibble tokenize | nibble detokenize");
  command->callback([model] { detokenize(*model); });
}

}  // namespace nibble::app
