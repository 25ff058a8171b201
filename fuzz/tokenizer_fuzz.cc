// The tokenizer, three ways; the first byte of the input says which of them the rest is:
// text to encode and decode, ids to decode, or a GGUF file to make a tokenizer of.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "gguf/gguf_file.h"
#include "support/small_vocabulary.h"
#include "text/chat.h"
#include "text/tokenizer.h"
#include "text/utf8.h"

namespace {

using nibble::TokenId;
using nibble::gguf::GgufFile;
using namespace nibble::text;

void require(bool condition) {
  if (!condition) __builtin_trap();
}

const Tokenizer& small_tokenizer() {
  static const auto tokenizer = [] {
    const auto bytes = nibble::test::SmallVocabulary::standard().file().build();
    return Tokenizer::from_gguf(GgufFile::from_bytes(bytes));
  }();
  return *tokenizer;
}

// What is left of a text that was encoded: "▁" is a space, broken bytes are U+FFFD.
std::string after_encoding(std::string_view text) {
  std::string expected;
  while (!text.empty()) {
    const Utf8Unit unit = first_unit(text);
    const std::string_view character = text.substr(0, unit.bytes);
    if (unit.kind != Utf8::kWhole) {
      expected += "\uFFFD";
    } else {
      expected += character == "\u2581" ? " " : character;
    }
    text.remove_prefix(unit.bytes);
  }
  return expected;
}

void encode_text(std::string_view text) {
  const Tokenizer& tokenizer = small_tokenizer();
  const std::string expected = after_encoding(text);
  const auto parsed = tokenizer.encode(text, Specials::kParse);
  require(tokenizer.decode(parsed, /*with_specials=*/true) == expected);
  const auto plain = tokenizer.encode(text, Specials::kText);
  require(tokenizer.decode(plain, /*with_specials=*/false) == expected);
  for (TokenId token : plain) require(!tokenizer.is_special(token));
}

void decode_ids(std::span<const uint8_t> bytes) {
  const Tokenizer& tokenizer = small_tokenizer();
  std::vector<TokenId> tokens;
  for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
    const uint32_t id = uint32_t(bytes[i]) << 8 | bytes[i + 1];
    tokens.push_back({int32_t(id % tokenizer.vocabulary())});
  }
  Decoder decoder(tokenizer, /*with_specials=*/true);
  AnswerStream answer(tokenizer);
  std::string streamed;
  const auto take = [&](const std::string& text) {
    require(after_encoding(text) == text);  // whole characters only
    streamed += text;
  };
  for (TokenId token : tokens) {
    take(decoder.push(token));
    const std::string piece = answer.push(token).text;
    require(after_encoding(piece) == piece);
  }
  take(decoder.finish());
  require(streamed == tokenizer.decode(tokens, /*with_specials=*/true));
}

void open_file(std::span<const uint8_t> bytes) {
  const GgufFile file = GgufFile::from_bytes(std::as_bytes(bytes));
  const auto tokenizer = Tokenizer::from_gguf(file);
  if (!tokenizer) return;
  const auto in_range = [&](const std::vector<TokenId>& tokens) {
    for (TokenId token : tokens) {
      require(token.value >= 0 && uint32_t(token.value) < tokenizer->vocabulary());
    }
    tokenizer->decode(tokens, /*with_specials=*/true);
  };
  if (const auto format = ChatFormat::from_gguf(file, *tokenizer)) {
    in_range(format->encode(std::vector<Message>{{Role::kUser, "abc"}}, /*think=*/true));
  }
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  in_range(tokenizer->encode(text, Specials::kParse));
  in_range(tokenizer->encode(text, Specials::kText));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::vector<uint8_t> rest(data + 1, data + size);  // its own block: reads past it are seen
  try {
    switch (data[0] % 3) {
      case 0:
        encode_text({reinterpret_cast<const char*>(rest.data()), rest.size()});
        break;
      case 1:
        decode_ids(rest);
        break;
      case 2:
        open_file(rest);
        break;
    }
  } catch (const nibble::Error&) {
    require(data[0] % 3 == 2);  // texts and ids of the fixed vocabulary are all fine
  }
  return 0;
}
