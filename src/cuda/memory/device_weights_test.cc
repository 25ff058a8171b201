#include "cuda/memory/device_weights.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "base/error.h"
#include "base/half.h"
#include "cuda/test_support.h"

namespace nibble::cuda {
namespace {

using backend::WeightStorage;
using quant::QuantType;

struct Tensor {
  QuantType type;
  uint32_t rows;
  std::vector<std::byte> bytes;

  Tensor(QuantType type, uint32_t rows, uint32_t columns, std::mt19937& random)
      : type(type), rows(rows), bytes(rows * quant::row_bytes(type, columns)) {
    for (std::byte& byte : bytes) byte = std::byte(random() & 0x3f);  // no infinite scales
  }
  backend::WeightSegment segment() const { return {"a tensor", type, rows, bytes}; }
};

// The values of a matrix as the device has them, by downloading its tiles or blocks.
std::vector<float> unpacked(const DeviceMatrix& matrix) {
  std::vector<float> values(size_t(matrix.rows) * matrix.columns);
  const auto take = [&](LayoutId id, const WeightRows& rows) {
    visit_layout(id, [&](auto layout) {
      using Layout = typename decltype(layout)::type;
      if (rows.row_bytes > 0) {
        std::vector<std::byte> blocks(rows.rows * rows.row_bytes);
        NIBBLE_CUDA(cudaMemcpy(blocks.data(), rows.data, blocks.size(), cudaMemcpyDeviceToHost));
        const std::span to(&values[size_t(rows.first_output) * matrix.columns],
                           size_t(rows.rows) * matrix.columns);
        quant::quant_traits(Layout::kSource).dequantize(blocks, to);
        return;
      }
      const TileGrid grid(rows.rows, matrix.columns);
      std::vector<Layout> tiles(grid.tiles());
      NIBBLE_CUDA(cudaMemcpy(tiles.data(), rows.data, tiles.size() * sizeof(Layout),
                             cudaMemcpyDeviceToHost));
      for (uint32_t r = 0; r < rows.rows; ++r) {
        for (uint32_t c = 0; c < matrix.columns; ++c) {
          values[size_t(rows.first_output + r) * matrix.columns + c] =
              tiles[r / kTileRows * grid.column_tiles + c / kTileColumns].value(r % kTileRows,
                                                                                c % kTileColumns);
        }
      }
    });
  };
  for (const MatrixPart& part : matrix.parts) {
    take(part.first, part.rows[0]);
    if (part.second) take(*part.second, part.rows[1]);
  }
  return values;
}

class StoredWeights : public testing::TestWithParam<WeightStorage> {};
INSTANTIATE_TEST_SUITE_P(, StoredWeights,
                         testing::Values(WeightStorage::kPacked, WeightStorage::kDirect),
                         [](const auto& info) { return std::string(to_string(info.param)); });

TEST_P(StoredWeights, HaveEveryTypesValuesAndShareWhatIsTheSame) {
  NIBBLE_NEEDS_GPU();
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  constexpr uint32_t kColumns = 512;
  std::vector<Tensor> tensors;
  for (const quant::QuantTraits& traits : quant::all_quant_traits())
    tensors.emplace_back(traits.type, 37, kColumns, random);
  for (const QuantType type :
       {QuantType::kQ6_K, QuantType::kQ4_K, QuantType::kQ4_K, QuantType::kQ6_K})
    tensors.emplace_back(type, 48, kColumns, random);
  backend::Plan plan;
  for (const Tensor& tensor : tensors) plan.weights.push_back({kColumns, {tensor.segment()}});
  const size_t n = tensors.size();
  backend::Weight fused{kColumns, {}};
  for (size_t i = n - 4; i < n; ++i) fused.segments.push_back(tensors[i].segment());
  plan.weights.push_back(fused);
  plan.weights.push_back(fused);

  uint64_t last = 0, total = 0;
  const DeviceWeights weights(plan, GetParam(), [&](std::string_view, uint64_t done, uint64_t of) {
    EXPECT_GE(done, last);
    last = done;
    total = of;
  });
  EXPECT_EQ(last, total);
  EXPECT_EQ(weights.memory().size(), stored_bytes(plan, GetParam()));
  const DeviceMatrix& first = weights.matrix({uint32_t(n)});
  EXPECT_EQ(first.parts[0].rows[0].data, weights.matrix({uint32_t(n + 1)}).parts[0].rows[0].data);
  EXPECT_EQ(first.parts.size(), 2u);  // two runs of Q6_K, one of them beside the one of Q4_K

  for (size_t i = 0; i < plan.weights.size(); ++i) {
    const backend::Weight& weight = plan.weights[i];
    const std::vector<float> values = unpacked(weights.matrix({uint32_t(i)}));
    size_t row = 0;
    for (const backend::WeightSegment& segment : weight.segments) {
      std::vector<float> expected(size_t(segment.rows) * kColumns);
      quant::quant_traits(segment.type).dequantize(segment.data, expected);
      for (size_t j = 0; j < expected.size(); ++j) {
        const bool own =
            QuantType::kF16 == segment.type || layout_of(segment.type) != LayoutId::kF16;
        const float wanted = own ? expected[j] : f16_to_f32(f32_to_f16(expected[j]));
        ASSERT_EQ(values[row * kColumns + j], wanted)
            << quant::quant_traits(segment.type).name << ", weight " << i << ", value " << j;
      }
      row += segment.rows;
    }
  }
}

TEST(DeviceWeights, TakePackedTilesAsTheyAre) {
  NIBBLE_NEEDS_GPU();
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  constexpr uint32_t kColumns = 768;
  backend::Plan plan, packed;
  std::vector<std::vector<std::byte>> tiles;
  std::vector<Tensor> tensors;
  for (const quant::QuantTraits& traits : quant::all_quant_traits()) {
    backend::Weight fused{kColumns, {}};
    for (const uint32_t rows : {4096u, 37u}) {  // pieces of a large one, and a last row of tiles
      tensors.emplace_back(traits.type, rows, kColumns, random);
      fused.segments.push_back(tensors.back().segment());
    }
    plan.weights.push_back(fused);
    backend::Weight& weight = packed.weights.emplace_back(fused);
    for (backend::WeightSegment& segment : weight.segments) {
      std::vector<std::byte>& to =
          tiles.emplace_back(packed_bytes(layout_of(segment.type), segment.rows, kColumns));
      pack_rows(segment, kColumns, 0, segment.rows, to.data());
      segment.data = to;
      segment.packed = true;
    }
  }
  const DeviceWeights from_file(plan, WeightStorage::kPacked, {}),
      from_packed(packed, WeightStorage::kPacked, {});
  EXPECT_EQ(from_packed.memory().size(), from_file.memory().size());
  for (uint32_t i = 0; i < plan.weights.size(); ++i)
    EXPECT_EQ(unpacked(from_packed.matrix({i})), unpacked(from_file.matrix({i}))) << i;
}

TEST(DeviceWeights, RefuseWhatF16CannotHold) {
  NIBBLE_NEEDS_GPU();
  const std::vector<float> values(256, 1e6f);
  backend::Plan plan;
  plan.weights.push_back(
      {256, {{"blk.0.large", QuantType::kF32, 1, std::as_bytes(std::span(values))}}});
  try {
    const DeviceWeights weights(plan, WeightStorage::kPacked, {});
    FAIL() << "took it";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string(error.what()).find("blk.0.large"), std::string::npos);
  }
}

}  // namespace
}  // namespace nibble::cuda
