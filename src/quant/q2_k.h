#pragma once
// Q2_K: 2-bit values, a 4-bit scale and a 4-bit minimum for each 16. Format:
// docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ2K {
  static constexpr uint32_t kValues = 256;
  uint8_t scales[16];  // of values [16 g, 16 g + 16): scale in bits 0-3, minimum in bits 4-7
  uint8_t quants[64];  // value 128 n + 32 j + l is bits 2 j, 2 j + 1 of byte 32 n + l
  BlockF16 scale;      // of the scales
  BlockF16 min_scale;  // of the minimums
};
static_assert(sizeof(BlockQ2K) == 84 && alignof(BlockQ2K) == 1);

inline void dequantize(const BlockQ2K& block, float* values /*[256]*/) {
  const float block_scale = block.scale.value();
  const float block_min = block.min_scale.value();
  for (int g = 0; g < 16; ++g) {
    const float scale = block_scale * float(block.scales[g] & 0xf);
    const float min = block_min * float(block.scales[g] >> 4);
    const uint8_t* quants = block.quants + 32 * (g / 8) + 16 * (g % 2);
    const int shift = 2 * (g / 2 % 4);
    for (int l = 0; l < 16; ++l) values[16 * g + l] = scale * float(quants[l] >> shift & 3) - min;
  }
}

}  // namespace nibble::quant
