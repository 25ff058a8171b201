#pragma once
// Integers that can't be mistaken for one another.

#include <compare>
#include <cstdint>
#include <functional>

namespace nibble {

// Same size and alignment as Int, so arrays of ids may be read from files of Int.
template <class Tag, class Int = uint32_t>
struct Id {
  Int value{};
  friend constexpr auto operator<=>(Id, Id) = default;
};

using TokenId = Id<struct TokenTag, int32_t>;

}  // namespace nibble

template <class Tag, class Int>
struct std::hash<nibble::Id<Tag, Int>> {
  size_t operator()(nibble::Id<Tag, Int> id) const noexcept { return std::hash<Int>()(id.value); }
};
