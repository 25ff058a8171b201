#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <string_view>
#include <vector>

#include "text/vocabulary.h"

namespace nibble::text {

// Byte-pair encoding of plain text (Sennrich et al. 2016, "Neural Machine Translation of Rare Words
// with Subword Units") over UTF-8 characters: the neighbours whose merge ranks lowest are joined
// first, of equal ones the leftmost, until no merge is left. Characters that are no token become
// their bytes. A linked list and a heap make it O(n log n).
class Bpe {
 public:
  explicit Bpe(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Appends the tokens of `text` (under 2 GiB) to `out`. A space is "▁". Newlines are never joined
  // with anything else; a run of them that is a token is that token.
  void encode(std::string_view text, std::vector<TokenId>& out);

 private:
  struct Symbol {
    TokenId token;   // or kNone, kMerged
    uint32_t begin;  // of its bytes in the run
    uint32_t previous, next;
  };

  void encode_run(std::string_view run, std::vector<TokenId>& out);
  void split(std::string_view run);
  void propose(uint32_t left);
  void merge_all();
  void append_bytes(std::string_view character, std::vector<TokenId>& out) const;

  const Vocabulary& vocabulary_;
  // Kept between runs for their memory.
  std::vector<Symbol> symbols_;
  // Merges that were possible when they were proposed: rank << 32 | left symbol.
  std::priority_queue<uint64_t, std::vector<uint64_t>, std::greater<>> proposals_;
};

}  // namespace nibble::text
