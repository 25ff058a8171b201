#include "cuda/layouts/arrangement.h"

#include <cmath>
#include <cstring>
#include <map>

#include "base/checked_math.h"
#include "base/error.h"
#include "base/half.h"

namespace nibble::cuda {
namespace {

using backend::Weight;
using backend::WeightSegment;
using backend::WeightStorage;
using quant::QuantType;

std::vector<Run> runs_of(const Weight& weight) {
  std::vector<Run> runs;
  uint32_t row = 0;
  for (const WeightSegment& segment : weight.segments) {
    const LayoutId layout = layout_of(segment.type);
    const bool joins =
        !runs.empty() && runs.back().layout == layout && runs.back().rows % kTileRows == 0;
    if (!joins) runs.push_back({layout, row, 0, {}, 0});
    runs.back().segments.push_back(&segment);
    runs.back().rows += segment.rows;
    row += segment.rows;
  }
  return runs;
}

}  // namespace

LayoutId layout_of(QuantType type) {
  switch (type) {
    case QuantType::kQ4_K:
      return LayoutId::kQ4;
    case QuantType::kQ5_K:
      return LayoutId::kQ5;
    case QuantType::kQ6_K:
      return LayoutId::kQ6;
    case QuantType::kQ8_0:
      return LayoutId::kQ8;
    case QuantType::kQ4_0:
      return LayoutId::kQ4Symmetric;
    case QuantType::kBF16:
      return LayoutId::kBf16;
    default:
      return LayoutId::kF16;
  }
}

QuantType packed_from(QuantType type) {
  return visit_layout(layout_of(type), [](auto layout) { return decltype(layout)::type::kSource; });
}

uint64_t packed_bytes(LayoutId layout, uint32_t rows, uint32_t columns) {
  return TileGrid(rows, columns).tiles() * tile_bytes(layout);
}

uint64_t stored_bytes(LayoutId layout, uint32_t rows, uint32_t columns, WeightStorage storage) {
  if (storage == WeightStorage::kPacked) return packed_bytes(layout, rows, columns);
  return visit_layout(layout, [&](auto type) {
    return rows * quant::row_bytes(decltype(type)::type::kSource, columns);
  });
}

Arrangement::Arrangement(const backend::Plan& plan, uint64_t alignment, WeightStorage storage) {
  std::map<std::vector<const std::byte*>, size_t> seen;
  for (const Weight& weight : plan.weights) {
    std::vector<const std::byte*> key;
    for (const WeightSegment& segment : weight.segments) key.push_back(segment.data.data());
    const auto [place, is_new] = seen.emplace(key, distinct.size());
    of_weight.push_back(place->second);
    if (!is_new) continue;
    distinct.push_back(&weight);
    runs.push_back(runs_of(weight));
    for (Run& run : runs.back()) {
      run.offset = bytes;
      bytes += round_up(stored_bytes(run.layout, run.rows, weight.columns, storage), alignment);
    }
  }
}

void read_blocks(const WeightSegment& segment, uint32_t columns, uint32_t first_row, uint32_t rows,
                 std::byte* to) {
  const uint64_t row = quant::row_bytes(segment.type, columns);
  const auto from = segment.data.subspan(first_row * row, rows * row);
  if (packed_from(segment.type) == segment.type) {
    std::memcpy(to, from.data(), from.size());
    return;
  }
  std::vector<float> values(columns);
  for (uint32_t r = 0; r < rows; ++r) {
    quant::quant_traits(segment.type).dequantize(from.subspan(r * row, row), values);
    for (const float value : values) {
      if (std::abs(value) > kLargestHalf) {
        fail(ErrorCode::kUnsupported,
             "{}: weight {} is beyond what f16 holds ({}), which this GPU's kernels compute in; "
             "use --backend cpu",
             segment.name, value, kLargestHalf);
      }
      const uint16_t bits = f32_to_f16(value);
      std::memcpy(to, &bits, sizeof bits);
      to += sizeof bits;
    }
  }
}

void pack_rows(const WeightSegment& segment, uint32_t columns, uint32_t first_row, uint32_t rows,
               std::byte* tiles) {
  const uint64_t bytes = rows * quant::row_bytes(packed_from(segment.type), columns);
  std::vector<std::byte> blocks(bytes);
  read_blocks(segment, columns, first_row, rows, blocks.data());
  visit_layout(layout_of(segment.type), [&](auto layout) {
    using Layout = typename decltype(layout)::type;
    pack_matrix(reinterpret_cast<const typename Layout::Block*>(blocks.data()), rows, columns,
                reinterpret_cast<Layout*>(tiles));
  });
}

}  // namespace nibble::cuda
