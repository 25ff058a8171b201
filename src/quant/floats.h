#pragma once
// Floating-point numbers as GGUF stores them: little-endian bytes at any address. F16 is also the
// scale of most block formats. Format: docs/formats/gguf-blocks.md.

#include <bit>
#include <cstdint>

#include "base/half.h"

namespace nibble::quant {

// IEEE 754 binary32.
struct BlockF32 {
  static constexpr uint32_t kValues = 1;
  uint8_t bytes[4];  // bits 0-7 first

  float value() const {
    const uint32_t bits = uint32_t{bytes[0]} | uint32_t{bytes[1]} << 8 | uint32_t{bytes[2]} << 16 |
                          uint32_t{bytes[3]} << 24;
    return std::bit_cast<float>(bits);
  }
};
static_assert(sizeof(BlockF32) == 4 && alignof(BlockF32) == 1);

// IEEE 754 binary16.
struct BlockF16 {
  static constexpr uint32_t kValues = 1;
  uint8_t bytes[2];  // bits 0-7 first

  float value() const { return f16_to_f32(uint16_t(bytes[0] | bytes[1] << 8)); }
};
static_assert(sizeof(BlockF16) == 2 && alignof(BlockF16) == 1);

// The upper half of a binary32.
struct BlockBF16 {
  static constexpr uint32_t kValues = 1;
  uint8_t bytes[2];  // bits 0-7 first

  float value() const { return bf16_to_f32(uint16_t(bytes[0] | bytes[1] << 8)); }
};
static_assert(sizeof(BlockBF16) == 2 && alignof(BlockBF16) == 1);

inline void dequantize(const BlockF32& block, float* values /*[1]*/) {
  *values = block.value();
}
inline void dequantize(const BlockF16& block, float* values /*[1]*/) {
  *values = block.value();
}
inline void dequantize(const BlockBF16& block, float* values /*[1]*/) {
  *values = block.value();
}

}  // namespace nibble::quant
