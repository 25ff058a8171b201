#pragma once
// Q5_1: 5-bit values, scale and offset. Format: docs/formats/gguf-blocks.md.

#include "quant/floats.h"

namespace nibble::quant {

struct BlockQ5_1 {
  static constexpr uint32_t kValues = 32;
  BlockF16 scale;
  BlockF16 offset;       // what quant 0 stands for
  uint8_t high_bits[4];  // bit 4 of value i is bit i % 8 of byte i / 8
  uint8_t quants[16];    // bits 0-3: byte j has value j in bits 0-3, value j + 16 in bits 4-7
};
static_assert(sizeof(BlockQ5_1) == 24 && alignof(BlockQ5_1) == 1);

inline void dequantize(const BlockQ5_1& block, float* values /*[32]*/) {
  const float scale = block.scale.value();
  const float offset = block.offset.value();
  for (int j = 0; j < 16; ++j) {
    const int low = block.high_bits[j / 8] >> (j % 8) & 1;
    const int high = block.high_bits[j / 8 + 2] >> (j % 8) & 1;
    values[j] = float((block.quants[j] & 0xf) | low << 4) * scale + offset;
    values[j + 16] = float(block.quants[j] >> 4 | high << 4) * scale + offset;
  }
}

}  // namespace nibble::quant
