// The reader of packed models: any bytes give an Error or a model of which every part can be read.
// The input is a model section and weights; the header around them is right, so that what lies
// behind its hash is reached.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "base/error.h"
#include "engine/packed_format.h"
#include "engine/packed_model.h"

namespace {

using namespace nibble;
using engine::packed::Header;
using engine::packed::kPageBytes;

// Reads a byte of every page, and the last one.
void read(std::span<const std::byte> bytes) {
  for (size_t at = 0; at < bytes.size(); at += kPageBytes)
    static_cast<void>(*static_cast<const volatile std::byte*>(&bytes[at]));
  if (!bytes.empty()) static_cast<void>(*static_cast<const volatile std::byte*>(&bytes.back()));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // The first byte says how many pages of zeros there are for weights.
  if (size == 0) return 0;
  const auto section = std::as_bytes(std::span(data, size)).subspan(1);
  const size_t begin = (sizeof(Header) + section.size() + kPageBytes - 1) / kPageBytes * kPageBytes;
  std::vector<std::byte> file(begin + data[0] * kPageBytes);
  std::memcpy(file.data() + sizeof(Header), section.data(), section.size());
  Header header{{}, engine::packed::kFormatVersion, file.size(), begin - sizeof(Header), {}, {}};
  engine::packed::kMagic.copy(header.magic, sizeof header.magic);
  header.model_hash =
      engine::content_hash(std::span(file).subspan(sizeof header, header.model_bytes));
  std::memcpy(file.data(), &header, sizeof header);
  try {
    const engine::PackedModel model = engine::PackedModel::from_bytes(file);
    for (const engine::PackedWeight& weight : model.weights()) {
      read(weight.data);
      read(weight.stretch);
    }
    for (const gguf::Tensor& tensor : model.model().tensors()) {
      read(tensor.data);
      read(model.tiles(tensor.name));
    }
    const backend::Plan plan = model.build_plan();
    for (const backend::Weight& weight : plan.weights) {
      for (const backend::WeightSegment& segment : weight.segments) read(segment.data);
    }
  } catch (const Error&) {
  }
  return 0;
}
