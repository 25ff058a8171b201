#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/id.h"
#include "gguf/gguf_file.h"

namespace nibble::text {

// Whether text that spells a special token becomes that token.
enum class Specials {
  kParse,  // control, user-defined and unknown tokens are recognised
  // User text: only user-defined tokens, and of those none that is spelled like a marker of turns,
  // channels, tools or media ("<|...>", "<...|>").
  kText,
};

// Text to token ids and back, for the tokenizers that GGUF files carry. Immutable, thread-safe.
class Tokenizer {
 public:
  // Builds the tokenizer of `tokenizer.ggml.model`; nullptr when it is "no_vocab". Copies what it
  // needs. Throws Error(kMalformedFile) on inconsistent vocabularies, kUnsupported (with the list
  // of what is supported) on other tokenizer models.
  static std::unique_ptr<const Tokenizer> from_gguf(const gguf::GgufFile& file);
  ~Tokenizer();

  uint32_t vocabulary() const;
  std::optional<TokenId> bos() const;
  bool is_end_of_generation(TokenId token) const;
  bool is_special(TokenId token) const;                      // control or unknown: not shown
  std::optional<TokenId> find(std::string_view text) const;  // the token of exactly this text

  // Ids of `text`, no BOS added. Time is about linear in its length. Specials are cut out from left
  // to right, the longest at each place. Invalid UTF-8 is encoded byte by byte. A character that is
  // no token and lacks byte tokens becomes the unknown token, and throws Error(kUnsupported) where
  // there is none. Throws Error(kInvalidArgument) for 2 GiB of text or more.
  std::vector<TokenId> encode(std::string_view text, Specials specials) const;

  // The token's bytes as text: "▁" is a space, "<0x41>" a byte; a special token gives its own
  // spelling. Throws Error(kInvalidArgument) when the id is not in the vocabulary.
  std::string piece(TokenId token) const;
  // All pieces, special ones only when asked for. Bytes that form no UTF-8 become U+FFFD, one for
  // each maximal subpart (Unicode, section 3.9).
  std::string decode(std::span<const TokenId> tokens, bool with_specials) const;

 private:
  struct Data;
  explicit Tokenizer(std::unique_ptr<const Data> data);
  std::unique_ptr<const Data> data_;
};

// Streaming decode: what push() returns is always whole UTF-8 characters. `tokenizer` must outlive
// the decoder.
class Decoder {
 public:
  Decoder(const Tokenizer& tokenizer, bool with_specials);
  // The text that `token` completes; bytes of an unfinished character are held back.
  std::string push(TokenId token);
  // What is still held back, as U+FFFD.
  std::string finish();

 private:
  const Tokenizer& tokenizer_;
  bool with_specials_;
  std::string pending_;
};

}  // namespace nibble::text
