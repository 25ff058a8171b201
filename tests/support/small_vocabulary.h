#pragma once
// A tokenizer small enough to read in a test, as the metadata of a GGUF file.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "support/gguf_builder.h"

namespace nibble::test {

struct SmallVocabulary {
  // `tokenizer.ggml.token_type`
  static constexpr int32_t kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kByte = 6;

  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  std::vector<std::string> merges;  // "left right"

  // <pad> 0, <eos> 1, <bos> 2, <unk> 3, then the markers of turns, channels, thinking and tools
  // (of mixed types, as files have them), the user-defined "<b>" and "<b>!", all bytes, "▁", the
  // newline, the letters and a few merges of them.
  static SmallVocabulary standard();

  int32_t add(std::string_view text, int32_t type = kNormal);  // the new token's id
  // Adds a merge and, where it lacks, the token that it makes.
  void add_merge(const std::string& left, const std::string& right);
  int32_t id(std::string_view text) const;  // throws where there is no such token

  // The arrays and "tokenizer.ggml.model", no special ids.
  GgufBuilder file() const;
};

}  // namespace nibble::test
