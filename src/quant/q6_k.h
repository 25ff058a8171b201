#pragma once
// Q6_K: 6-bit values around 32, an 8-bit scale for each 16. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ6K {
  static constexpr uint32_t kValues = 256;
  // Value 128 n + 32 j + l: bits 0-3 in byte 64 n + 32 (j % 2) + l (its low nibble for j < 2, else
  // the high one) of low_bits; bits 4-5 are bits 2 j, 2 j + 1 of byte 32 n + l of high_bits.
  uint8_t low_bits[128];
  uint8_t high_bits[64];
  int8_t scales[16];  // of values [16 g, 16 g + 16)
  BlockF16 scale;     // of the scales
};
static_assert(sizeof(BlockQ6K) == 210 && alignof(BlockQ6K) == 1);

inline void dequantize(const BlockQ6K& block, float* values /*[256]*/) {
  const float block_scale = block.scale.value();
  for (int g = 0; g < 16; ++g) {
    const int n = g / 8;
    const int j = g / 2 % 4;
    const uint8_t* low_bits = block.low_bits + 64 * n + 32 * (j % 2) + 16 * (g % 2);
    const uint8_t* high_bits = block.high_bits + 32 * n + 16 * (g % 2);
    const float scale = block_scale * float(block.scales[g]);
    for (int l = 0; l < 16; ++l) {
      const int quant = (low_bits[l] >> (j / 2 * 4) & 0xf) | (high_bits[l] >> (2 * j) & 3) << 4;
      values[16 * g + l] = scale * float(quant - 32);
    }
  }
}

}  // namespace nibble::quant
