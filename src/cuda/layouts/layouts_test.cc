#include "cuda/layouts/layouts.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/checked_math.h"
#include "support/fixtures.h"

namespace nibble::cuda {
namespace {

template <class Layout>
class WeightLayout : public testing::Test {
 protected:
  using Block = typename Layout::Block;

  // Packs `blocks` and expects every value to be the one that GGUF's dequantisation gives.
  static void expect_lossless(const std::vector<Block>& blocks, uint32_t rows, uint32_t columns) {
    const TileGrid grid(rows, columns);
    std::vector<Layout> tiles(grid.tiles());
    pack_matrix(blocks.data(), rows, columns, tiles.data());

    std::vector<float> row_values(columns);
    const auto& traits = quant::quant_traits(Layout::kSource);
    const auto bytes = std::as_bytes(std::span(blocks));
    const size_t row_bytes = quant::row_bytes(Layout::kSource, columns);
    for (uint32_t row = 0; row < grid.row_tiles * kTileRows; ++row) {
      if (row < rows) traits.dequantize(bytes.subspan(row * row_bytes, row_bytes), row_values);
      for (uint32_t column = 0; column < grid.column_tiles * kTileColumns; ++column) {
        const bool exists = row < rows && column < columns;
        const float expected = exists ? row_values[column] : 0.0f;
        const Layout& tile = tiles[row / kTileRows * grid.column_tiles + column / kTileColumns];
        const float actual = tile.value(row % kTileRows, column % kTileColumns);
        if (std::isnan(expected) && std::isnan(actual)) continue;
        if (!exists && actual == 0.0f) continue;  // of either sign
        ASSERT_EQ(std::bit_cast<uint32_t>(actual), std::bit_cast<uint32_t>(expected))
            << "row " << row << ", column " << column << ": " << actual << " instead of "
            << expected;
      }
    }
  }
};

using AllLayouts = testing::Types<CudaQ4Tiled, CudaQ5Tiled, CudaQ6Tiled, CudaQ8Tiled,
                                  CudaQ4SymmetricTiled, CudaF16Tiled, CudaBf16Tiled>;
TYPED_TEST_SUITE(WeightLayout, AllLayouts);

TYPED_TEST(WeightLayout, KeepsRandomBlocksBitForBit) {
  using Block = typename TypeParam::Block;
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  for (const auto& [rows, columns] : {std::pair{16u, 256u}, {1u, 512u}, {37u, 768u}}) {
    std::vector<Block> blocks(size_t(rows) * columns / Block::kValues);
    for (std::byte& byte : std::as_writable_bytes(std::span(blocks))) byte = std::byte(random());
    this->expect_lossless(blocks, rows, columns);
  }
}

TYPED_TEST(WeightLayout, PadsRowsThatAreNoWholeTile) {
  using Block = typename TypeParam::Block;
  // One tile of columns and a little more; of types whose blocks are as long as a tile, two.
  const uint32_t columns = round_up(288u, uint32_t{Block::kValues});
  std::vector<Block> blocks(5 * columns / Block::kValues);
  uint32_t next = 1;
  for (std::byte& byte : std::as_writable_bytes(std::span(blocks))) byte = std::byte(next++ * 37);
  this->expect_lossless(blocks, 5, columns);
}

// The layouts of types that ggml quantises.
template <class Layout>
class QuantizedLayout : public WeightLayout<Layout> {};
using QuantizedLayouts =
    testing::Types<CudaQ4Tiled, CudaQ5Tiled, CudaQ6Tiled, CudaQ8Tiled, CudaQ4SymmetricTiled>;
TYPED_TEST_SUITE(QuantizedLayout, QuantizedLayouts);

TYPED_TEST(QuantizedLayout, KeepsGgmlsOwnBlocks) {
  using Block = typename TypeParam::Block;
  const std::string name(quant::quant_traits(TypeParam::kSource).name);
  const std::string file = test::read_file(test::fixture("quant/" + name + ".blocks"));
  std::vector<Block> blocks(file.size() / sizeof(Block));
  std::memcpy(blocks.data(), file.data(), file.size());
  this->expect_lossless(blocks, 48, 256);
}

TYPED_TEST(WeightLayout, TakesNoMoreThanTheFile) {
  EXPECT_EQ(sizeof(TypeParam), kTileRows * quant::row_bytes(TypeParam::kSource, kTileColumns));
}

}  // namespace
}  // namespace nibble::cuda
