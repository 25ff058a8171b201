#pragma once
// Q4_1: 4-bit values, scale and offset. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ4_1 {
  static constexpr uint32_t kValues = 32;
  BlockF16 scale;
  BlockF16 offset;     // what quant 0 stands for
  uint8_t quants[16];  // byte j: value j in bits 0-3, value j + 16 in bits 4-7
};
static_assert(sizeof(BlockQ4_1) == 20 && alignof(BlockQ4_1) == 1);

inline void dequantize(const BlockQ4_1& block, float* values /*[32]*/) {
  const float scale = block.scale.value();
  const float offset = block.offset.value();
  for (int j = 0; j < 16; ++j) {
    values[j] = float(block.quants[j] & 0xf) * scale + offset;
    values[j + 16] = float(block.quants[j] >> 4) * scale + offset;
  }
}

}  // namespace nibble::quant
