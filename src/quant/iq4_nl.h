#pragma once
// IQ4_NL: indices into 16 uneven levels, one scale. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

inline constexpr int8_t kIQ4Levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                          1,    13,   25,  38,  53,  69,  89,  113};

struct BlockIQ4NL {
  static constexpr uint32_t kValues = 32;
  BlockF16 scale;
  uint8_t quants[16];  // byte j: value j in bits 0-3, value j + 16 in bits 4-7
};
static_assert(sizeof(BlockIQ4NL) == 18 && alignof(BlockIQ4NL) == 1);

inline void dequantize(const BlockIQ4NL& block, float* values /*[32]*/) {
  const float scale = block.scale.value();
  for (int j = 0; j < 16; ++j) {
    values[j] = scale * float(kIQ4Levels[block.quants[j] & 0xf]);
    values[j + 16] = scale * float(kIQ4Levels[block.quants[j] >> 4]);
  }
}

}  // namespace nibble::quant
