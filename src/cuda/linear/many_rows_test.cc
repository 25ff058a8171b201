#include <gtest/gtest.h>

#include <cmath>
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
  const DeviceArray<uint16_t> values(packed);
  const DeviceArray<float> device_scales(scales);
  activations.values = values.data();

  const std::vector<std::byte> blocks = random_blocks(c.layout, c.matrix_rows, c.columns, random);
  const DeviceArray<std::byte> raw{std::span<const std::byte>(blocks)};
  const DeviceArray<std::byte> tiles(TileGrid(c.matrix_rows, c.columns).tiles() *
                                     tile_bytes(c.layout));
  pack_on_device(nullptr, c.layout, raw.data(), c.matrix_rows, c.columns, 0, tiles.data());

  constexpr uint32_t kFirstOutput = 3;
  const uint32_t stride = c.matrix_rows + 5;
  std::vector<ManyRowsLaunch> launches =
      many_rows_candidates(device_shape(), unit, c.layout, c.matrix_rows, c.columns, c.rows);
  const ManyRowsLaunch launch = launches[random() % launches.size()];
  SCOPED_TRACE(testing::Message() << launch.sharers << " blocks a multiprocessor, "
                                  << launch.column_chunks << " chunks");
  const size_t part_floats = size_t(c.rows) * stride;
  const DeviceArray<float> output(launch.column_chunks * part_floats);
  const ManyRowsArgs args = {{tiles.data(), c.matrix_rows, kFirstOutput},
                             activations,
                             device_scales.data(),
                             output.data(),
                             stride,
                             workspace.data()};
  for (int round = 0; round < 2; ++round) {  // the second on what the first left in the workspace
    NIBBLE_CUDA(cudaMemset(output.data(), 0xff, output.size() * 4));  // NaN
    launch_many_rows(nullptr, c.layout, args, launch);
  }
  NIBBLE_CUDA(cudaDeviceSynchronize());
  const std::vector<float> result = output.download();

  // A weight is rounded to 11 bits, after its scale and its minimum were; a minimum is at most
  // about twice as large as the weights of its group. So an error has a standard deviation of at
  // most 2^-11 sqrt((1 + 9 + 4) / 3) times the weight, and they are independent but for groups of
  // 32, which random activations set apart again: seven standard deviations.
  const double tolerance = 16 * std::exp2(-11);
  quant::QuantType type{};
  visit_layout(c.layout, [&](auto layout) { type = decltype(layout)::type::kSource; });
  const size_t row_bytes = quant::row_bytes(type, c.columns);
  std::vector<float> weights(c.columns);
  for (uint32_t row = 0; row < c.rows; ++row) {
    for (uint32_t i = 0; i < stride; ++i) {
      if (i >= kFirstOutput && i < kFirstOutput + c.matrix_rows) continue;
      for (uint32_t part = 0; part < launch.column_chunks; ++part) {
        ASSERT_TRUE(std::isnan(result[part * part_floats + size_t(row) * stride + i]))
            << "wrote beside its columns";
      }
    }
  }
  for (uint32_t n = 0; n < c.matrix_rows; n += 1 + c.matrix_rows / 500) {  // all, if not too many
    quant::quant_traits(type).dequantize(std::span(blocks).subspan(n * row_bytes, row_bytes),
                                         weights);
    for (uint32_t row = 0; row < c.rows; ++row) {
      double expected = 0, squares = 0;
      for (uint32_t k = 0; k < c.columns; ++k) {
        const double product = double(weights[k]) * x[size_t(row) * c.columns + k];
        expected += product;
        squares += product * product;
      }
      double actual = 0;
      for (uint32_t part = 0; part < launch.column_chunks; ++part)
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
    for (const uint32_t rows : {9u, 33u, 50u, 64u, 130u})
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

}  // namespace
}  // namespace nibble::cuda
