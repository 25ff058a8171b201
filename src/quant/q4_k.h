#pragma once
// Q4_K: 4-bit values, a 6-bit scale and a 6-bit minimum for each 32. Format:
// docs/formats/gguf-blocks.md.

#include "quant/floats.h"
#include "quant/k_scales.h"

namespace nibble::quant {

struct BlockQ4K {
  static constexpr uint32_t kValues = 256;
  BlockF16 scale;      // of the scales
  BlockF16 min_scale;  // of the minimums
  KScales scales;
  // Byte 32 i + l: value 64 i + l in bits 0-3, value 64 i + 32 + l in bits 4-7.
  uint8_t quants[128];
};
static_assert(sizeof(BlockQ4K) == 144 && alignof(BlockQ4K) == 1);

inline void dequantize(const BlockQ4K& block, float* values /*[256]*/) {
  const float block_scale = block.scale.value();
  const float block_min = block.min_scale.value();
  for (int g = 0; g < 8; ++g) {
    const float scale = block_scale * float(block.scales.scale(g));
    const float min = block_min * float(block.scales.min(g));
    const uint8_t* quants = block.quants + 32 * (g / 2);
    const int shift = 4 * (g % 2);
    for (int l = 0; l < 32; ++l) values[32 * g + l] = scale * float(quants[l] >> shift & 0xf) - min;
  }
}

}  // namespace nibble::quant
