#include <gtest/gtest.h>

#include <cmath>
#include <optional>
#include <random>
#include <vector>

#include "base/half.h"
#include "cuda/device_array.h"
#include "cuda/layouts/pack.h"
#include "cuda/linear/launch_many_rows.h"
#include "cuda/test_support.h"
#include "quant/quant_type.h"

namespace nibble::cuda {
namespace {

// Random blocks with scales of a trained file's size: values of about 0.05.
std::vector<std::byte> random_blocks(LayoutId id, uint32_t rows, uint32_t columns,
                                     std::mt19937& random) {
  std::vector<std::byte> bytes;
  visit_layout(id, [&](auto layout) {
    using Block = typename decltype(layout)::type::Block;
    std::vector<Block> blocks(size_t(rows) * columns / Block::kValues);
    for (std::byte& byte : std::as_writable_bytes(std::span(blocks))) byte = std::byte(random());
    const auto set = [&](uint8_t* to, float size) {
      const uint16_t bits = f32_to_f16(std::uniform_real_distribution<float>(0, size)(random));
      to[0] = uint8_t(bits);
      to[1] = uint8_t(bits >> 8);
    };
    for (Block& block : blocks) {
      if constexpr (requires { block.min_scale; }) {
        set(block.scale.bytes, 1e-4f);
        set(block.min_scale.bytes, 1e-3f);
      } else if constexpr (requires { block.scale; }) {
        set(block.scale.bytes, sizeof(Block) == sizeof(quant::BlockQ6K) ? 3e-5f : 3e-3f);
      } else {
        block.bytes[1] = (block.bytes[1] & 0x80) | (id == LayoutId::kBf16 ? 0x3d : 0x2a);
      }
    }
    const auto raw = std::as_bytes(std::span(blocks));
    bytes.assign(raw.begin(), raw.end());
  });
  return bytes;
}

// As a backend has it: one for all launches, cleared once.
class Workspace {
 public:
  Workspace() { NIBBLE_CUDA(cudaMemset(bytes_.data(), 0, bytes_.size())); }
  void* data() const { return bytes_.data(); }

 private:
  const DeviceArray<std::byte> bytes_{many_rows_workspace_bytes(device_shape())};
};

struct Case {
  LayoutId layout;
  uint32_t matrix_rows, columns, rows;
  // Behind `matrix_rows` of the first layout, in one launch.
  std::optional<LayoutId> second = {};
  uint32_t second_rows = 0;
};

void expect_product(const Workspace& workspace, const Case& c, MatrixUnit unit) {
  const uint32_t seed = std::random_device{}();
  std::mt19937 random(seed);
  SCOPED_TRACE(testing::Message() << "layout " << int(c.layout) << ", " << c.matrix_rows << " x "
                                  << c.columns << ", rows " << c.rows << ", unit " << int(unit)
                                  << ", seed " << seed);
  // Activations whose rows beyond the last one are NaN, and scales that are powers of two.
  ActivationBlocks activations = {nullptr, c.rows, TileGrid(1, c.columns).column_tiles};
  std::vector<uint16_t> packed(activations.size(), 0x7e00);
  std::vector<float> x(size_t(c.rows) * c.columns), scales(c.rows);
  std::normal_distribution<float> normal;
  for (uint32_t row = 0; row < c.rows; ++row) {
    scales[row] = float(1 << row % 3);
    for (uint32_t column = 0; column < activations.column_tiles * kTileColumns; ++column) {
      const uint16_t bits = column < c.columns ? f32_to_f16(normal(random)) : uint16_t{0};
      packed[activation_block_index(row, column, activations.row_groups())] = bits;
      if (column < c.columns) x[size_t(row) * c.columns + column] = f16_to_f32(bits);
    }
  }
  const DeviceArray<uint16_t> device_values(packed);
  const DeviceArray<float> device_scales(scales);
  activations.values = device_values.data();

  struct Weight {
    LayoutId layout;
    uint32_t rows;
    std::vector<std::byte> blocks;
    DeviceArray<std::byte> tiles;

    Weight(LayoutId layout, uint32_t rows, uint32_t columns, std::mt19937& random)
        : layout(layout),
          rows(rows),
          blocks(random_blocks(layout, rows, columns, random)),
          tiles(TileGrid(rows, columns).tiles() * tile_bytes(layout)) {
      const DeviceArray<std::byte> raw{std::span<const std::byte>(blocks)};
      pack_on_device(nullptr, layout, raw.data(), rows, columns, 0, tiles.data());
      NIBBLE_CUDA(cudaDeviceSynchronize());
    }
  };
  std::vector<Weight> weights;
  weights.emplace_back(c.layout, c.matrix_rows, c.columns, random);
  if (c.second) weights.emplace_back(*c.second, c.second_rows, c.columns, random);
  const uint32_t outputs = c.matrix_rows + c.second_rows;

  constexpr uint32_t kFirstOutput = 3;
  const uint32_t stride = outputs + 5;
  std::vector<ManyRowsLaunch> launches =
      many_rows_candidates(device_shape(), unit, c.layout, c.matrix_rows, c.columns, c.rows);
  const ManyRowsLaunch launch = launches[random() % launches.size()];
  const uint32_t parts = c.second ? 1 : launch.column_chunks;
  SCOPED_TRACE(testing::Message() << parts << " chunks");
  const size_t part_floats = size_t(c.rows) * stride;
  const DeviceArray<float> output(parts * part_floats);
  ManyRowsArgs args = {{{weights[0].tiles.data(), c.matrix_rows, kFirstOutput}},
                       activations,
                       device_scales.data(),
                       output.data(),
                       stride,
                       workspace.data()};
  if (c.second) {
    args.weights[1] = {weights[1].tiles.data(), c.second_rows, kFirstOutput + c.matrix_rows};
  }
  for (int round = 0; round < 2; ++round) {  // the second on what the first left in the workspace
    NIBBLE_CUDA(cudaMemset(output.data(), 0xff, output.size() * 4));  // NaN
    if (c.second) {
      ASSERT_TRUE(has_many_rows_kernel(unit, c.layout, *c.second, c.rows));
      launch_many_rows(nullptr, c.layout, *c.second, args,
                       choose_many_rows(device_shape(), c.layout, c.matrix_rows, *c.second,
                                        c.second_rows, c.columns, c.rows));
    } else {
      launch_many_rows(nullptr, c.layout, args, launch);
    }
  }
  NIBBLE_CUDA(cudaDeviceSynchronize());
  const std::vector<float> result = output.download();

  // A weight is rounded to 11 bits, after its scale and its minimum were; a minimum is at most
  // about twice as large as the weights of its group. So an error has a standard deviation of at
  // most 2^-11 sqrt((1 + 9 + 4) / 3) times the weight, and they are independent but for groups of
  // 32, which random activations set apart again: seven standard deviations.
  const double tolerance = 16 * std::exp2(-11);
  for (uint32_t row = 0; row < c.rows; ++row) {
    for (uint32_t i = 0; i < stride; ++i) {
      if (i >= kFirstOutput && i < kFirstOutput + outputs) continue;
      for (uint32_t part = 0; part < parts; ++part) {
        ASSERT_TRUE(std::isnan(result[part * part_floats + size_t(row) * stride + i]))
            << "wrote beside its columns";
      }
    }
  }
  std::vector<float> values(c.columns);
  for (uint32_t n = 0; n < outputs; n += 1 + outputs / 500) {  // all, if not too many
    const bool second = n >= c.matrix_rows;
    const Weight& weight = weights[second];
    quant::QuantType type{};
    visit_layout(weight.layout, [&](auto layout) { type = decltype(layout)::type::kSource; });
    const size_t row_bytes = quant::row_bytes(type, c.columns);
    quant::quant_traits(type).dequantize(
        std::span(weight.blocks).subspan((n - second * c.matrix_rows) * row_bytes, row_bytes),
        values);
    for (uint32_t row = 0; row < c.rows; ++row) {
      double expected = 0, squares = 0;
      for (uint32_t k = 0; k < c.columns; ++k) {
        const double product = double(values[k]) * x[size_t(row) * c.columns + k];
        expected += product;
        squares += product * product;
      }
      double actual = 0;
      for (uint32_t part = 0; part < parts; ++part)
        actual += result[part * part_floats + size_t(row) * stride + kFirstOutput + n];
      ASSERT_LE(std::abs(actual - scales[row] * expected),
                scales[row] * tolerance * std::sqrt(squares))
          << "output " << n << ", row " << row;
    }
  }
}

constexpr LayoutId kAll[] = {LayoutId::kQ4,          LayoutId::kQ5,  LayoutId::kQ6,  LayoutId::kQ8,
                             LayoutId::kQ4Symmetric, LayoutId::kF16, LayoutId::kBf16};

TEST(ManyRows, EqualsTheProductInEveryLayoutAndTile) {
  NIBBLE_NEEDS_GPU();
  const Workspace workspace;
  for (const LayoutId layout : kAll) {
    for (const uint32_t rows : {9u, 20u, 32u, 33u, 50u, 64u, 130u})
      expect_product(workspace, {layout, 333, 768, rows}, device_matrix_unit());
    expect_product(workspace, {layout, 333, 768, 77}, MatrixUnit::kMma);
  }
}

TEST(ManyRows, TakesMatricesOfAllShapes) {
  NIBBLE_NEEDS_GPU();
  const Workspace workspace;
  for (const MatrixUnit unit : {device_matrix_unit(), MatrixUnit::kMma}) {
    expect_product(workspace, {LayoutId::kQ4, 1, 256, 9}, unit);
    expect_product(workspace, {LayoutId::kQ4, 257, 512, 129}, unit);
    expect_product(workspace, {LayoutId::kQ8, 100, 288, 16},
                   unit);  // columns that end within a tile
    expect_product(workspace, {LayoutId::kF16, 40, 77, 300}, unit);
    expect_product(workspace, {LayoutId::kQ6, 300, 5376, 20}, unit);  // tiles of up to 8 blocks
    for (int i = 0; i < 8; ++i)  // a candidate each, with shares that begin and end anywhere
      expect_product(workspace, {LayoutId::kQ4, 4000, 3072, 40}, unit);
    expect_product(workspace, {LayoutId::kQ4, 9000, 768, 600},
                   unit);  // whole tiles, then shared ones
    expect_product(workspace, {LayoutId::kQ4, 1000, 256, 1200},
                   unit);  // nothing to share along the columns
  }
}

TEST(ManyRows, TakesTwoLayoutsInOneLaunch) {
  NIBBLE_NEEDS_GPU();
  if (!has_many_rows_kernel(device_matrix_unit(), LayoutId::kQ4, LayoutId::kQ6, 64))
    GTEST_SKIP() << "of Hopper's instructions only";
  const Workspace workspace;
  for (const uint32_t rows : {17u, 32u, 41u, 64u}) {
    for (const LayoutId first : {LayoutId::kQ4, LayoutId::kQ5}) {
      expect_product(workspace, {first, 333, 1024, rows, LayoutId::kQ6, 77}, device_matrix_unit());
    }
  }
  expect_product(workspace, {LayoutId::kQ4, 6000, 2048, 50, LayoutId::kQ6, 2000},
                 device_matrix_unit());
}

}  // namespace
}  // namespace nibble::cuda
