#pragma once
// The packed scales that Q4_K and Q5_K share.

#include <cstdint>

namespace nibble::quant {

// Eight 6-bit scales and eight 6-bit minimums, one of each for 32 values. Groups 0-3: scale in
// bits 0-5 of byte g, minimum in bits 0-5 of byte g + 4. Groups 4-7: low nibbles in byte g + 4
// (scale in bits 0-3, minimum in bits 4-7), bits 4-5 on top of the bytes of group g - 4.
struct KScales {
  uint8_t bytes[12];

  constexpr int scale(int g) const {
    return g < 4 ? bytes[g] & 0x3f : (bytes[g + 4] & 0xf) | (bytes[g - 4] >> 6) << 4;
  }
  constexpr int min(int g) const {
    return g < 4 ? bytes[g + 4] & 0x3f : bytes[g + 4] >> 4 | (bytes[g] >> 6) << 4;
  }
};
static_assert(sizeof(KScales) == 12 && alignof(KScales) == 1);

}  // namespace nibble::quant
