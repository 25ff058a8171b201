#include "text/vocabulary.h"

#include <algorithm>
#include <charconv>

#include "base/error.h"

namespace nibble::text {
namespace {

constexpr size_t kMaxEntries = INT32_MAX;  // token ids are 32-bit, and so are ranks

// The array `key` as `read` (a GgufFile accessor) gives it; it must be there.
template <class T>
std::vector<T> require_array(const gguf::GgufFile& file, std::string_view key,
                             std::optional<std::vector<T>> (gguf::GgufFile::*read)(std::string_view)
                                 const) {
  auto array = (file.*read)(key);
  if (!array) fail(ErrorCode::kMalformedFile, "{} is missing: it is needed to read text", key);
  if (array->size() > kMaxEntries) {
    fail(ErrorCode::kMalformedFile, "{} has {} entries; at most {} are possible", key,
         array->size(), kMaxEntries);
  }
  return *std::move(array);
}

void check_length(std::string_view key, size_t found, size_t tokens) {
  if (found == tokens) return;
  fail(ErrorCode::kMalformedFile, "{} has {} entries, but there are {} tokens", key, found, tokens);
}

// The NN of "<0xNN>".
uint8_t parse_byte_token(size_t token, std::string_view text) {
  uint8_t byte = 0;
  if (text.size() == 6 && text.starts_with("<0x") && text[5] == '>') {
    const char* end = text.data() + 5;
    if (std::from_chars(text.data() + 3, end, byte, 16).ptr == end) return byte;
  }
  fail(ErrorCode::kMalformedFile, "token {} is of the type byte but spelled \"{}\", not \"<0xNN>\"",
       token, text);
}

uint64_t pair_key(TokenId left, TokenId right) {
  return uint64_t(uint32_t(left.value)) << 32 | uint32_t(right.value);
}

}  // namespace

Vocabulary::Vocabulary(const gguf::GgufFile& file) {
  load_tokens(file);
  load_merges(file);
  load_special_ids(file);
}

void Vocabulary::load_tokens(const gguf::GgufFile& file) {
  using gguf::GgufFile;
  const auto tokens = require_array(file, "tokenizer.ggml.tokens", &GgufFile::find_string_array);
  if (tokens.empty()) fail(ErrorCode::kMalformedFile, "tokenizer.ggml.tokens is empty");
  const auto types = require_array(file, "tokenizer.ggml.token_type", &GgufFile::find_int_array);
  check_length("tokenizer.ggml.token_type", types.size(), tokens.size());
  // Scores rank nothing here: merges do. A wrong length still means a damaged file.
  if (const auto scores = file.find_float_array("tokenizer.ggml.scores")) {
    check_length("tokenizer.ggml.scores", scores->size(), tokens.size());
  }

  size_t bytes = 0;
  for (std::string_view token : tokens) bytes += token.size();
  texts_.reserve(bytes);
  begins_.reserve(tokens.size() + 1);
  types_.reserve(tokens.size());
  begins_.push_back(0);
  by_text_ = FlatIndex(tokens.size());
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (types[i] < 0 || types[i] > int64_t(TokenType::kByte)) {
      fail(ErrorCode::kMalformedFile, "token {} has the type {}; types are 0 to 6", i, types[i]);
    }
    const TokenId token{int32_t(i)};
    const std::string_view text = tokens[i];
    types_.push_back(TokenType(types[i]));
    texts_ += text;
    begins_.push_back(texts_.size());
    by_text_.insert(hash_(text), uint32_t(i),
                    [&](uint32_t other) { return this->text({int32_t(other)}) == text; });
    if (type(token) == TokenType::kByte) {
      auto& byte = bytes_[parse_byte_token(i, text)];
      if (!byte) byte = token;
    }
  }
}

void Vocabulary::load_merges(const gguf::GgufFile& file) {
  const auto lines =
      require_array(file, "tokenizer.ggml.merges", &gguf::GgufFile::find_string_array);
  merges_.reserve(lines.size());
  by_pair_ = FlatIndex(lines.size());
  std::string joined;
  for (size_t rank = 0; rank < lines.size(); ++rank) {
    const std::string_view line = lines[rank];
    const size_t space = line.find(' ', 1);
    if (space == std::string_view::npos) {
      fail(ErrorCode::kMalformedFile, "merge {} is \"{}\", not two tokens with a space between",
           rank, line);
    }
    const std::string_view left = line.substr(0, space), right = line.substr(space + 1);
    joined.assign(left).append(right);
    const auto id = [&](std::string_view text) {
      const auto token = find(text);
      if (token) return *token;
      fail(ErrorCode::kMalformedFile,
           "merge {} (\"{}\") needs the token \"{}\", which there is not", rank, line, text);
    };
    const Merge merge{id(left), id(right), id(joined)};
    merges_.push_back(merge);
    // Text must not spell a control token by way of merges: such a merge is never found.
    if (!is_plain(merge.result)) continue;
    by_pair_.insert(hash_(pair_key(merge.left, merge.right)), uint32_t(rank), [&](uint32_t other) {
      return merges_[other].left == merge.left && merges_[other].right == merge.right;
    });
  }
}

void Vocabulary::load_special_ids(const gguf::GgufFile& file) {
  const auto read = [&](std::string_view key) -> std::optional<TokenId> {
    const auto id = file.find_uint(key);
    if (!id) return std::nullopt;
    if (*id >= size()) {
      fail(ErrorCode::kMalformedFile, "{} is {}, but there are only {} tokens", key, *id, size());
    }
    return TokenId{int32_t(*id)};
  };
  const auto read_or = [&](std::string_view key, TokenId otherwise) {
    if (const auto token = read(key)) return *token;
    if (contains(otherwise)) return otherwise;
    fail(ErrorCode::kMalformedFile, "{} is missing, and its default {} is not among the {} tokens",
         key, otherwise.value, size());
  };

  for (const gguf::Metadata& entry : file.metadata()) {
    if (entry.key.starts_with("tokenizer.ggml.") && entry.key.ends_with("_token_id")) {
      read(entry.key);  // also those that are not used here: none may be out of range
    }
  }
  bos_ = read_or("tokenizer.ggml.bos_token_id", {2});
  unknown_ = read("tokenizer.ggml.unknown_token_id");
  end_of_generation_.push_back(read_or("tokenizer.ggml.eos_token_id", {1}));
  for (const auto token :
       {read("tokenizer.ggml.eot_token_id"), find("<turn|>"), find("<|tool_response>")}) {
    if (token) end_of_generation_.push_back(*token);
  }
}

bool Vocabulary::is_marker(TokenId token) const {
  const std::string_view text = this->text(token);
  return (text.starts_with("<|") && text.ends_with(">")) ||
         (text.starts_with("<") && text.ends_with("|>"));
}

bool Vocabulary::is_plain(TokenId token) const {
  switch (type(token)) {
    case TokenType::kUnknown:
    case TokenType::kControl:
    case TokenType::kByte:
      return false;
    default:
      return !is_marker(token);
  }
}

std::optional<TokenId> Vocabulary::find(std::string_view text) const {
  const auto position = by_text_.find(
      hash_(text), [&](uint32_t other) { return this->text({int32_t(other)}) == text; });
  if (!position) return std::nullopt;
  return TokenId{int32_t(*position)};
}

std::optional<TokenId> Vocabulary::find_plain(std::string_view text) const {
  const auto token = find(text);
  return token && is_plain(*token) ? token : std::nullopt;
}

std::optional<uint32_t> Vocabulary::find_merge(TokenId left, TokenId right) const {
  return by_pair_.find(hash_(pair_key(left, right)), [&](uint32_t rank) {
    return merges_[rank].left == left && merges_[rank].right == right;
  });
}

bool Vocabulary::is_end_of_generation(TokenId token) const {
  return std::find(end_of_generation_.begin(), end_of_generation_.end(), token) !=
         end_of_generation_.end();
}

}  // namespace nibble::text
