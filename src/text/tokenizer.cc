#include "text/tokenizer.h"

#include <charconv>

#include "base/error.h"
#include "text/bpe.h"
#include "text/special_matcher.h"
#include "text/utf8.h"
#include "text/vocabulary.h"

namespace nibble::text {
namespace {

constexpr size_t kMaxTextBytes = INT32_MAX;
constexpr std::string_view kReplacement = "\uFFFD";

// The tokens that are cut out of a text before anything else.
std::vector<SpecialMatcher::Special> specials_of(const Vocabulary& vocabulary, Specials specials) {
  std::vector<SpecialMatcher::Special> found;
  for (int32_t id = 0; uint32_t(id) < vocabulary.size(); ++id) {
    const TokenId token{id};
    const TokenType type = vocabulary.type(token);
    const bool wanted = specials == Specials::kParse
                            ? type == TokenType::kUnknown || type == TokenType::kControl ||
                                  type == TokenType::kUserDefined
                            : type == TokenType::kUserDefined && vocabulary.is_plain(token);
    const std::string_view text = vocabulary.text(token);
    if (!wanted || text.empty()) continue;
    if (text.size() > SpecialMatcher::kMaxBytes) {
      fail(ErrorCode::kMalformedFile, "special token {} is {} bytes long; at most {} are allowed",
           id, text.size(), SpecialMatcher::kMaxBytes);
    }
    found.push_back({text, token});
  }
  return found;
}

// Moves all whole characters from the front of `pending` to the result, U+FFFD for bytes that form
// none. An unfinished character stays.
std::string take_characters(std::string& pending) {
  std::string whole;
  std::string_view rest = pending;
  while (!rest.empty()) {
    const Utf8Unit unit = first_unit(rest);
    if (unit.kind == Utf8::kUnfinished) break;
    whole += unit.kind == Utf8::kWhole ? rest.substr(0, unit.bytes) : kReplacement;
    rest.remove_prefix(unit.bytes);
  }
  pending.erase(0, pending.size() - rest.size());
  return whole;
}

}  // namespace

struct Tokenizer::Data {
  explicit Data(const gguf::GgufFile& file)
      : vocabulary(file),
        all_specials(specials_of(vocabulary, Specials::kParse)),
        text_specials(specials_of(vocabulary, Specials::kText)) {}

  Vocabulary vocabulary;
  SpecialMatcher all_specials, text_specials;
};

std::unique_ptr<const Tokenizer> Tokenizer::from_gguf(const gguf::GgufFile& file) {
  const std::string_view model = file.require_string("tokenizer.ggml.model");
  if (model == "no_vocab") return nullptr;
  if (model != "gemma4") {
    fail(ErrorCode::kUnsupported, "the tokenizer model \"{}\" is not supported; \"gemma4\" is",
         model);
  }
  return std::unique_ptr<const Tokenizer>(new Tokenizer(std::make_unique<const Data>(file)));
}

Tokenizer::Tokenizer(std::unique_ptr<const Data> data) : data_(std::move(data)) {}
Tokenizer::~Tokenizer() = default;

uint32_t Tokenizer::vocabulary() const {
  return data_->vocabulary.size();
}

std::optional<TokenId> Tokenizer::bos() const {
  return data_->vocabulary.bos();
}

bool Tokenizer::is_end_of_generation(TokenId token) const {
  return data_->vocabulary.is_end_of_generation(token);
}

bool Tokenizer::is_special(TokenId token) const {
  const Vocabulary& vocabulary = data_->vocabulary;
  if (!vocabulary.contains(token)) return false;
  const TokenType type = vocabulary.type(token);
  return type == TokenType::kControl || type == TokenType::kUnknown;
}

std::optional<TokenId> Tokenizer::find(std::string_view text) const {
  return data_->vocabulary.find(text);
}

std::vector<TokenId> Tokenizer::encode(std::string_view text, Specials specials) const {
  if (text.size() > kMaxTextBytes) {
    fail(ErrorCode::kInvalidArgument, "the text has {} bytes; at most {} can be encoded at once",
         text.size(), kMaxTextBytes);
  }
  const SpecialMatcher& matcher =
      specials == Specials::kParse ? data_->all_specials : data_->text_specials;
  std::vector<TokenId> tokens;
  Bpe bpe(data_->vocabulary);
  size_t plain = 0;  // where the text begins that is not encoded yet
  for (size_t i = 0; i < text.size();) {
    const SpecialMatcher::Special* special = matcher.match(text.substr(i));
    if (special == nullptr) {
      ++i;
      continue;
    }
    bpe.encode(text.substr(plain, i - plain), tokens);
    tokens.push_back(special->token);
    i += special->text.size();
    plain = i;
  }
  bpe.encode(text.substr(plain), tokens);
  return tokens;
}

std::string Tokenizer::piece(TokenId token) const {
  const Vocabulary& vocabulary = data_->vocabulary;
  if (!vocabulary.contains(token)) {
    fail(ErrorCode::kInvalidArgument, "there is no token {}: the vocabulary has {} tokens",
         token.value, vocabulary.size());
  }
  std::string_view text = vocabulary.text(token);
  if (is_special(token)) return std::string(text);
  if (vocabulary.type(token) == TokenType::kByte) {
    uint8_t byte = 0;
    std::from_chars(text.data() + 3, text.data() + 5, byte, 16);  // "<0xNN>", as checked
    return std::string(1, char(byte));
  }
  std::string piece;
  for (size_t mark; (mark = text.find(kSpaceMark)) != std::string_view::npos;) {
    piece.append(text.substr(0, mark)).push_back(' ');
    text.remove_prefix(mark + kSpaceMark.size());
  }
  return piece.append(text);
}

std::string Tokenizer::decode(std::span<const TokenId> tokens, bool with_specials) const {
  Decoder decoder(*this, with_specials);
  std::string text;
  for (TokenId token : tokens) text += decoder.push(token);
  return text + decoder.finish();
}

Decoder::Decoder(const Tokenizer& tokenizer, bool with_specials)
    : tokenizer_(tokenizer), with_specials_(with_specials) {}

std::string Decoder::push(TokenId token) {
  if (with_specials_ || !tokenizer_.is_special(token)) pending_ += tokenizer_.piece(token);
  return take_characters(pending_);
}

std::string Decoder::finish() {
  if (pending_.empty()) return {};
  pending_.clear();
  return std::string(kReplacement);
}

}  // namespace nibble::text
