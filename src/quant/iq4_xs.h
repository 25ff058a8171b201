#pragma once
// IQ4_XS: indices into the levels of IQ4_NL, a 6-bit scale for each 32. Format:
// docs/formats/gguf-blocks.md.

#include "quant/iq4_nl.h"

namespace nibble::quant {

struct BlockIQ4XS {
  static constexpr uint32_t kValues = 256;
  BlockF16 scale;          // of the scales
  uint8_t scales_high[2];  // bits 4-5 of scale g are bits 2 (g % 4), 2 (g % 4) + 1 of byte g / 4
  uint8_t scales_low[4];   // bits 0-3 of scale g: low nibble of byte g / 2 for even g, else high
  uint8_t quants[128];     // byte 16 g + j: value 32 g + j in bits 0-3, 32 g + j + 16 in bits 4-7

  // The scale of values [32 g, 32 g + 32), -32..31.
  int group_scale(int g) const {
    const int low = scales_low[g / 2] >> (g % 2 * 4) & 0xf;
    const int high = scales_high[g / 4] >> (g % 4 * 2) & 3;
    return (low | high << 4) - 32;
  }
};
static_assert(sizeof(BlockIQ4XS) == 136 && alignof(BlockIQ4XS) == 1);

inline void dequantize(const BlockIQ4XS& block, float* values /*[256]*/) {
  const float block_scale = block.scale.value();
  for (int g = 0; g < 8; ++g) {
    const float scale = block_scale * float(block.group_scale(g));
    for (int j = 0; j < 16; ++j) {
      const uint8_t quants = block.quants[16 * g + j];
      values[32 * g + j] = scale * float(kIQ4Levels[quants & 0xf]);
      values[32 * g + j + 16] = scale * float(kIQ4Levels[quants >> 4]);
    }
  }
}

}  // namespace nibble::quant
