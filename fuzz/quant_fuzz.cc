// Block decoders: the first byte picks the format, the rest are blocks of any bits.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "quant/quant_type.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const auto all = nibble::quant::all_quant_traits();
  const nibble::quant::QuantTraits& traits = all[data[0] % all.size()];
  const size_t count = (size - 1) / traits.block_bytes;
  std::vector<float> values(count * traits.block_values);
  traits.dequantize(std::as_bytes(std::span(data + 1, count * traits.block_bytes)), values);
  return 0;
}
