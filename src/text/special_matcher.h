#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "base/id.h"

namespace nibble::text {

// Finds the longest of a set of token texts at a place in a text.
class SpecialMatcher {
 public:
  struct Special {
    std::string_view text;  // 1 to kMaxBytes bytes; must outlive the matcher
    TokenId token;
  };
  // Bounds the work at each place of a text, whatever file the specials come from.
  static constexpr size_t kMaxBytes = 256;

  // Of specials with the same text, the first counts.
  explicit SpecialMatcher(std::vector<Special> specials);

  // The longest special that `text` starts with; nullptr when there is none.
  const Special* match(std::string_view text) const;

 private:
  std::vector<Special> sorted_;        // by text
  std::array<uint32_t, 257> first_{};  // those that start with byte b: [first_[b], first_[b + 1])
};

}  // namespace nibble::text
