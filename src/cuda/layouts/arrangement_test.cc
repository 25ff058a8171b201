#include "cuda/layouts/arrangement.h"

#include <gtest/gtest.h>

#include <random>
#include <span>

#include "base/aligned_array.h"
#include "base/error.h"
#include "base/half.h"

namespace nibble::cuda {
namespace {

using backend::WeightSegment;
using quant::QuantType;

std::vector<float> values_of(LayoutId id, const std::byte* tiles, uint32_t rows, uint32_t columns) {
  std::vector<float> values;
  visit_layout(id, [&](auto layout) {
    const auto* matrix = reinterpret_cast<const typename decltype(layout)::type*>(tiles);
    const TileGrid grid(rows, columns);
    for (uint32_t r = 0; r < rows; ++r) {
      for (uint32_t c = 0; c < columns; ++c) {
        values.push_back(matrix[r / kTileRows * grid.column_tiles + c / kTileColumns].value(
            r % kTileRows, c % kTileColumns));
      }
    }
  });
  return values;
}

TEST(Arrangement, EveryTypeKeepsItsValuesOrTakesTheNearestHalf) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  constexpr uint32_t kRows = 37, kColumns = 512;
  for (const quant::QuantTraits& traits : quant::all_quant_traits()) {
    SCOPED_TRACE(traits.name);
    std::vector<std::byte> data(kRows * quant::row_bytes(traits.type, kColumns));
    for (std::byte& byte : data) byte = std::byte(random() & 0x3f);  // no infinite scales
    const WeightSegment segment{"a tensor", traits.type, kRows, data};
    std::vector<float> expected(size_t(kRows) * kColumns);
    traits.dequantize(data, expected);
    const LayoutId layout = layout_of(traits.type);
    if (packed_from(traits.type) != traits.type) {
      for (float& value : expected) value = f16_to_f32(f32_to_f16(value));
    }

    // In two pieces, as a large matrix is packed.
    const AlignedArray<std::byte> tiles(packed_bytes(layout, kRows, kColumns));
    pack_rows(segment, kColumns, 0, 16, tiles.data());
    pack_rows(segment, kColumns, 16, kRows - 16, tiles.data() + packed_bytes(layout, 16, kColumns));
    EXPECT_EQ(values_of(layout, tiles.data(), kRows, kColumns), expected);
  }
}

TEST(Arrangement, FusesWhatAgreesAndKeepsEachTensorOnce) {
  const std::vector<std::byte> data(1 << 20);
  const auto segment = [&](QuantType type, uint32_t rows, size_t at) {
    return WeightSegment{"t", type, rows, std::span(data).subspan(at)};
  };
  backend::Plan plan;
  plan.weights.push_back({256,
                          {segment(QuantType::kQ4_K, 32, 0), segment(QuantType::kQ4_K, 20, 1),
                           segment(QuantType::kQ4_K, 16, 2), segment(QuantType::kQ6_K, 16, 3)}});
  plan.weights.push_back(plan.weights[0]);
  plan.weights.push_back({256, {segment(QuantType::kQ4_K, 16, 4)}});
  const Arrangement arrangement(plan, 4096);
  EXPECT_EQ(arrangement.of_weight, (std::vector<size_t>{0, 0, 1}));
  // 20 rows end inside a tile, so nothing can follow them.
  const auto& runs = arrangement.runs[0];
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_EQ(runs[0].segments.size(), 2u);
  EXPECT_EQ(runs[0].rows, 52u);
  EXPECT_EQ(runs[1].first_row, 52u);
  EXPECT_EQ(runs[2].layout, LayoutId::kQ6);
  EXPECT_EQ(runs[1].offset, 12288u);  // behind 4 x 2,304 bytes
  EXPECT_EQ(arrangement.runs[1][0].offset, 20480u);
  EXPECT_EQ(arrangement.bytes, 24576u);
}

TEST(Arrangement, ValuesBeyondHalvesAreRefusedByName) {
  const std::vector<float> values(256, 1e6f);
  const WeightSegment segment{"blk.0.large", QuantType::kF32, 1, std::as_bytes(std::span(values))};
  const AlignedArray<std::byte> tiles(packed_bytes(LayoutId::kF16, 1, 256));
  try {
    pack_rows(segment, 256, 0, 1, tiles.data());
    FAIL() << "took it";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("blk.0.large"), std::string::npos);
  }
}

}  // namespace
}  // namespace nibble::cuda
