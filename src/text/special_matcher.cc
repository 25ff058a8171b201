#include "text/special_matcher.h"

#include <algorithm>
#include <utility>

namespace nibble::text {

SpecialMatcher::SpecialMatcher(std::vector<Special> specials) : sorted_(std::move(specials)) {
  const auto text = [](const Special& special) { return special.text; };
  std::ranges::stable_sort(sorted_, {}, text);
  const auto repeats = [](const Special& a, const Special& b) { return a.text == b.text; };
  sorted_.erase(std::unique(sorted_.begin(), sorted_.end(), repeats), sorted_.end());
  for (const Special& special : sorted_) ++first_[size_t(uint8_t(special.text[0])) + 1];
  for (size_t i = 1; i < first_.size(); ++i) first_[i] += first_[i - 1];
}

// Narrows the sorted specials to those that agree with one more byte of the text at a time. The
// shorter of two that agree sorts first, so a whole match is always the first of its range.
const SpecialMatcher::Special* SpecialMatcher::match(std::string_view text) const {
  const auto byte = uint8_t(text[0]);
  auto begin = sorted_.begin() + first_[byte];
  auto end = sorted_.begin() + first_[byte + 1];
  const Special* longest = nullptr;
  for (size_t length = 1; begin != end; ++length) {
    if (begin->text.size() == length) {
      longest = &*begin;
      ++begin;
    }
    if (length == text.size()) break;
    const auto next_byte = [length](const Special& special) {
      return uint8_t(special.text[length]);
    };
    begin = std::ranges::lower_bound(begin, end, uint8_t(text[length]), {}, next_byte);
    end = std::ranges::upper_bound(begin, end, uint8_t(text[length]), {}, next_byte);
  }
  return longest;
}

}  // namespace nibble::text
