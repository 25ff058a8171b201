#include "quant/quant_type.h"

#include <algorithm>

#include "base/error.h"
#include "quant/floats.h"
#include "quant/iq4_nl.h"
#include "quant/iq4_xs.h"
#include "quant/mxfp4.h"
#include "quant/q2_k.h"
#include "quant/q3_k.h"
#include "quant/q4_0.h"
#include "quant/q4_1.h"
#include "quant/q4_k.h"
#include "quant/q5_0.h"
#include "quant/q5_1.h"
#include "quant/q5_k.h"
#include "quant/q6_k.h"
#include "quant/q8_0.h"

namespace nibble::quant {
namespace {

template <class Block>
void dequantize_blocks(std::span<const std::byte> blocks, std::span<float> values) {
  const size_t count = blocks.size() / sizeof(Block);
  NIBBLE_CHECK(blocks.size() == count * sizeof(Block) && values.size() == count * Block::kValues);
  const auto* block = reinterpret_cast<const Block*>(blocks.data());
  for (size_t i = 0; i < count; ++i) {
    dequantize(block[i], values.data() + i * Block::kValues);
  }
}

template <class Block>
constexpr QuantTraits traits_of(QuantType type, std::string_view name) {
  return {type, name, Block::kValues, sizeof(Block), dequantize_blocks<Block>};
}

constexpr QuantTraits kTraits[] = {
    traits_of<BlockF32>(QuantType::kF32, "F32"),
    traits_of<BlockF16>(QuantType::kF16, "F16"),
    traits_of<BlockQ4_0>(QuantType::kQ4_0, "Q4_0"),
    traits_of<BlockQ4_1>(QuantType::kQ4_1, "Q4_1"),
    traits_of<BlockQ5_0>(QuantType::kQ5_0, "Q5_0"),
    traits_of<BlockQ5_1>(QuantType::kQ5_1, "Q5_1"),
    traits_of<BlockQ8_0>(QuantType::kQ8_0, "Q8_0"),
    traits_of<BlockQ2K>(QuantType::kQ2_K, "Q2_K"),
    traits_of<BlockQ3K>(QuantType::kQ3_K, "Q3_K"),
    traits_of<BlockQ4K>(QuantType::kQ4_K, "Q4_K"),
    traits_of<BlockQ5K>(QuantType::kQ5_K, "Q5_K"),
    traits_of<BlockQ6K>(QuantType::kQ6_K, "Q6_K"),
    traits_of<BlockIQ4NL>(QuantType::kIQ4_NL, "IQ4_NL"),
    traits_of<BlockIQ4XS>(QuantType::kIQ4_XS, "IQ4_XS"),
    traits_of<BlockBF16>(QuantType::kBF16, "BF16"),
    traits_of<BlockMXFP4>(QuantType::kMXFP4, "MXFP4"),
};

}  // namespace

std::span<const QuantTraits> all_quant_traits() {
  return kTraits;
}

const QuantTraits* find_quant_traits(uint32_t gguf_type_number) {
  const auto* found =
      std::find_if(std::begin(kTraits), std::end(kTraits), [&](const QuantTraits& traits) {
        return static_cast<uint32_t>(traits.type) == gguf_type_number;
      });
  return found == std::end(kTraits) ? nullptr : found;
}

const QuantTraits& quant_traits(QuantType type) {
  const QuantTraits* traits = find_quant_traits(static_cast<uint32_t>(type));
  NIBBLE_CHECK(traits != nullptr);
  return *traits;
}

}  // namespace nibble::quant
