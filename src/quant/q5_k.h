#pragma once
// Q5_K: 5-bit values, a 6-bit scale and a 6-bit minimum for each 32. Format:
// docs/formats/gguf-blocks.md.

#include "quant/floats.h"
#include "quant/k_scales.h"

namespace nibble::quant {

struct BlockQ5K {
  static constexpr uint32_t kValues = 256;
  BlockF16 scale;      // of the scales
  BlockF16 min_scale;  // of the minimums
  KScales scales;
  uint8_t high_bits[32];  // bit 4 of value 32 g + l is bit g of byte l
  // Bits 0-3: byte 32 i + l has value 64 i + l in bits 0-3, value 64 i + 32 + l in bits 4-7.
  uint8_t quants[128];
};
static_assert(sizeof(BlockQ5K) == 176 && alignof(BlockQ5K) == 1);

inline void dequantize(const BlockQ5K& block, float* values /*[256]*/) {
  const float block_scale = block.scale.value();
  const float block_min = block.min_scale.value();
  for (int g = 0; g < 8; ++g) {
    const float scale = block_scale * float(block.scales.scale(g));
    const float min = block_min * float(block.scales.min(g));
    const uint8_t* quants = block.quants + 32 * (g / 2);
    const int shift = 4 * (g % 2);
    for (int l = 0; l < 32; ++l) {
      const int quant = (quants[l] >> shift & 0xf) | (block.high_bits[l] >> g & 1) << 4;
      values[32 * g + l] = scale * float(quant) - min;
    }
  }
}

}  // namespace nibble::quant
