#pragma once
// Q3_K: 3-bit values around 4, a 6-bit scale for each 16. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ3K {
  static constexpr uint32_t kValues = 256;
  uint8_t high_bits[32];  // bit 2 of value 32 i + l is bit i of byte l
  uint8_t quants[64];     // bits 0-1: value 128 n + 32 j + l is bits 2 j, 2 j + 1 of byte 32 n + l
  uint8_t scales[12];     // 16 scales of 6 bits, see group_scale
  BlockF16 scale;         // of the scales

  // The scale of values [16 g, 16 g + 16), -32..31: bits 0-3 in bytes 0-7 (g < 8 in their low
  // nibbles, the others in the high ones), bits 4-5 in bytes 8-11.
  int group_scale(int g) const {
    const int low = scales[g % 8] >> (g / 8 * 4) & 0xf;
    const int high = scales[8 + g % 4] >> (g / 4 * 2) & 3;
    return (low | high << 4) - 32;
  }
};
static_assert(sizeof(BlockQ3K) == 110 && alignof(BlockQ3K) == 1);

inline void dequantize(const BlockQ3K& block, float* values /*[256]*/) {
  const float block_scale = block.scale.value();
  for (int g = 0; g < 16; ++g) {
    const float scale = block_scale * float(block.group_scale(g));
    const uint8_t* quants = block.quants + 32 * (g / 8) + 16 * (g % 2);
    const uint8_t* high_bits = block.high_bits + 16 * (g % 2);
    const int shift = 2 * (g / 2 % 4);
    for (int l = 0; l < 16; ++l) {
      const int quant = (quants[l] >> shift & 3) | (high_bits[l] >> (g / 2) & 1) << 2;
      values[16 * g + l] = scale * float(quant - 4);
    }
  }
}

}  // namespace nibble::quant
