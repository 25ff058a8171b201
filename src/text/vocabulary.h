#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/id.h"
#include "gguf/gguf_file.h"
#include "text/flat_index.h"

namespace nibble::text {

// The space of token texts: "▁", U+2581.
inline constexpr std::string_view kSpaceMark = "\u2581";

// `tokenizer.ggml.token_type`.
enum class TokenType : uint8_t {
  kUndefined = 0,
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6,
};

// The tokens and merges of a GGUF file, checked: every id that it hands out lies inside the
// vocabulary. Where several tokens share a text, the lowest id is the one that is found.
class Vocabulary {
 public:
  struct Merge {
    TokenId left, right, result;
  };

  // Throws Error(kMalformedFile) when arrays and ids do not fit together.
  explicit Vocabulary(const gguf::GgufFile& file);
  Vocabulary(const Vocabulary&) = delete;  // views into texts_ are handed out
  Vocabulary& operator=(const Vocabulary&) = delete;

  uint32_t size() const { return uint32_t(types_.size()); }
  bool contains(TokenId token) const { return token.value >= 0 && uint32_t(token.value) < size(); }

  // Of tokens that the vocabulary contains.
  std::string_view text(TokenId token) const {
    const size_t begin = begins_[size_t(token.value)];
    return std::string_view(texts_).substr(begin, begins_[size_t(token.value) + 1] - begin);
  }
  TokenType type(TokenId token) const { return types_[size_t(token.value)]; }
  // Whether the token is spelled like a marker of turns, channels, tools or media: "<|...>" or
  // "<...|>". Files give some of them the type of plain user-defined tokens.
  bool is_marker(TokenId token) const;
  // Whether plain text may become this token: no control token, no marker, no "<0xNN>" spelled out.
  bool is_plain(TokenId token) const;

  std::optional<TokenId> find(std::string_view text) const;
  std::optional<TokenId> find_plain(std::string_view text) const;
  std::optional<TokenId> byte(uint8_t byte) const { return bytes_[byte]; }

  // The rank of the merge of two neighbours, and the merge of a rank.
  std::optional<uint32_t> find_merge(TokenId left, TokenId right) const;
  const Merge& merge(uint32_t rank) const { return merges_[rank]; }

  TokenId bos() const { return bos_; }
  std::optional<TokenId> unknown() const { return unknown_; }
  bool is_end_of_generation(TokenId token) const;

 private:
  void load_tokens(const gguf::GgufFile& file);
  void load_merges(const gguf::GgufFile& file);
  void load_special_ids(const gguf::GgufFile& file);

  SecretHash hash_;
  std::string texts_;           // all token texts, one after the other
  std::vector<size_t> begins_;  // [size + 1] in texts_
  std::vector<TokenType> types_;
  FlatIndex by_text_{0};
  std::array<std::optional<TokenId>, 256> bytes_;
  std::vector<Merge> merges_;  // by rank
  FlatIndex by_pair_{0};
  TokenId bos_;
  std::optional<TokenId> unknown_;
  std::vector<TokenId> end_of_generation_;
};

}  // namespace nibble::text
