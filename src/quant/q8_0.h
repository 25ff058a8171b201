#pragma once
// Q8_0: signed 8-bit values, one scale. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ8_0 {
  static constexpr uint32_t kValues = 32;
  BlockF16 scale;
  int8_t quants[32];
};
static_assert(sizeof(BlockQ8_0) == 34 && alignof(BlockQ8_0) == 1);

inline void dequantize(const BlockQ8_0& block, float* values /*[32]*/) {
  const float scale = block.scale.value();
  for (int j = 0; j < 32; ++j) values[j] = float(block.quants[j]) * scale;
}

}  // namespace nibble::quant
