#pragma once
// The block formats of GGUF, by their numbers in the file.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

namespace nibble::quant {

enum class QuantType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2_K = 10,
  kQ3_K = 11,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kIQ4_NL = 20,
  kIQ4_XS = 23,
  kBF16 = 30,
  kMXFP4 = 39,
};

struct QuantTraits {
  QuantType type;
  std::string_view name;  // as GGUF tools print it: "Q4_K"
  uint32_t block_values;  // values in one block; a row is a whole number of blocks
  uint32_t block_bytes;
  // Dequantises `blocks` (n * block_bytes) into `values` (n * block_values), bit for bit as ggml
  // does; any bit pattern is accepted, NaN and infinite scales come out as they are.
  void (*dequantize)(std::span<const std::byte> blocks, std::span<float> values);
};

// All supported formats, in the order of the enum.
std::span<const QuantTraits> all_quant_traits();

// nullptr when the number is no supported type.
const QuantTraits* find_quant_traits(uint32_t gguf_type_number);

const QuantTraits& quant_traits(QuantType type);

// Bytes of a row of `values` values, which must be a multiple of the type's block_values.
inline uint64_t row_bytes(QuantType type, uint64_t values) {
  const QuantTraits& traits = quant_traits(type);
  return values / traits.block_values * traits.block_bytes;
}

}  // namespace nibble::quant
