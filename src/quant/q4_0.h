#pragma once
// Q4_0: 4-bit values around 8, one scale. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ4_0 {
  static constexpr uint32_t kValues = 32;
  BlockF16 scale;
  uint8_t quants[16];  // byte j: value j in bits 0-3, value j + 16 in bits 4-7
};
static_assert(sizeof(BlockQ4_0) == 18 && alignof(BlockQ4_0) == 1);

inline void dequantize(const BlockQ4_0& block, float* values /*[32]*/) {
  const float scale = block.scale.value();
  for (int j = 0; j < 16; ++j) {
    values[j] = float((block.quants[j] & 0xf) - 8) * scale;
    values[j + 16] = float((block.quants[j] >> 4) - 8) * scale;
  }
}

}  // namespace nibble::quant
