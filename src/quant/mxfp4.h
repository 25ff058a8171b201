#pragma once
// MXFP4: 4-bit floats (E2M1) under one power of two (E8M0), of the OCP Microscaling Formats
// specification 1.0. Format: docs/formats/gguf-blocks.md.

#include <bit>
#include <cstdint>

namespace nibble::quant {

// Twice the E2M1 values, so that they are integers.
inline constexpr int8_t kMXFP4DoubledLevels[16] = {0, 1,  2,  3,  4,  6,  8,  12,
                                                   0, -1, -2, -3, -4, -6, -8, -12};

struct BlockMXFP4 {
  static constexpr uint32_t kValues = 32;
  uint8_t exponent;    // the scale is 2^(exponent - 127)
  uint8_t quants[16];  // byte j: value j in bits 0-3, value j + 16 in bits 4-7

  // 2^(exponent - 128). 255, a NaN in the specification, is 2^127 here as it is in ggml.
  float half_scale() const {
    // 2^-128 and 2^-127 are subnormal.
    const uint32_t bits =
        exponent < 2 ? uint32_t{0x00200000} << exponent : uint32_t(exponent - 1) << 23;
    return std::bit_cast<float>(bits);
  }
};
static_assert(sizeof(BlockMXFP4) == 17 && alignof(BlockMXFP4) == 1);

inline void dequantize(const BlockMXFP4& block, float* values /*[32]*/) {
  const float half_scale = block.half_scale();
  for (int j = 0; j < 16; ++j) {
    values[j] = float(kMXFP4DoubledLevels[block.quants[j] & 0xf]) * half_scale;
    values[j + 16] = float(kMXFP4DoubledLevels[block.quants[j] >> 4]) * half_scale;
  }
}

}  // namespace nibble::quant
