#include <gtest/gtest.h>

#include <vector>

#include "cuda/linear/many_rows.h"

namespace nibble::cuda {
namespace {

constexpr DeviceShape kH100{132, 227 << 10};

struct Case {
  LayoutId layout;
  uint32_t matrix_rows, columns, rows;
  uint32_t chunks, tile_rows, tile_tokens, whole_tiles, shared_tiles, sharing_blocks, blocks;
};

TEST(ManyRowsChoice, FollowsItsRule) {
  const Case cases[] = {
      // The 31B model's matrices, up to 64 rows of them in a layout that was not measured.
      {LayoutId::kQ4, 43008, 5376, 2048, 1, 256, 128, 2640, 48, 132, 132},
      {LayoutId::kQ5, 43008, 5376, 64, 1, 128, 64, 0, 336, 264, 264},
      {LayoutId::kQ6, 5376, 21504, 1024, 1, 256, 128, 132, 36, 132, 132},
      {LayoutId::kQ5, 5376, 8192, 40, 4, 128, 64, 0, 168, 264, 264},
      {LayoutId::kQ5, 5376, 21504, 64, 6, 128, 64, 0, 252, 264, 264},
      // Tiles of 16-bit weights are half as tall: their bytes would not fit.
      {LayoutId::kF16, 16384, 5376, 512, 1, 128, 128, 396, 116, 132, 132},
      {LayoutId::kF16, 16384, 5376, 33, 1, 128, 64, 0, 128, 132, 132},
      // Few tiles: not more blocks than can share them.
      {LayoutId::kQ4, 300, 768, 9, 3, 128, 32, 0, 9, 9, 9},
      {LayoutId::kQ4, 256, 21504, 33, 12, 128, 64, 0, 24, 168, 168},
      {LayoutId::kQ4, 132 * 256, 768, 100, 1, 256, 128, 132, 0, 0, 132},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message() << c.matrix_rows << " x " << c.columns << ", " << c.rows);
    const ManyRowsLaunch launch = choose_many_rows(kH100, MatrixUnit::kWgmma, c.layout,
                                                   c.matrix_rows, c.columns, c.rows, true);
    EXPECT_EQ(launch.column_chunks, c.chunks);
    EXPECT_EQ(launch.tile_rows, c.tile_rows);
    EXPECT_EQ(launch.tile_tokens, c.tile_tokens);
    EXPECT_EQ(launch.whole_tiles, c.whole_tiles);
    EXPECT_EQ(launch.tiles() - launch.whole_tiles, c.shared_tiles);
    EXPECT_EQ(launch.sharing_blocks, c.sharing_blocks);
    EXPECT_EQ(launch.blocks, c.blocks);
  }
}

TEST(ManyRowsChoice, TakesWhatWasMeasured) {
  for (const MeasuredChoice& choice : measured_choices()) {
    for (const uint32_t rows : {17u, 32u, 33u, kStreamTokens}) {
      const ManyRowsLaunch launch =
          choose_many_rows({choice.multiprocessors, 227 << 10}, MatrixUnit::kWgmma, choice.layout,
                           choice.matrix_rows, choice.columns, rows, true);
      EXPECT_EQ(launch.column_chunks, choice.column_chunks)
          << choice.matrix_rows << " x " << choice.columns;
    }
  }
}

TEST(ManyRowsChoice, TwoLayoutsShareTheDevice) {
  EXPECT_TRUE(has_many_rows_kernel(MatrixUnit::kWgmma, LayoutId::kQ4, LayoutId::kQ6, 64));
  EXPECT_FALSE(has_many_rows_kernel(MatrixUnit::kWgmma, LayoutId::kQ4, LayoutId::kQ6, 65));
  EXPECT_FALSE(has_many_rows_kernel(MatrixUnit::kWgmma, LayoutId::kQ6, LayoutId::kQ4, 64));
  EXPECT_FALSE(has_many_rows_kernel(MatrixUnit::kMma, LayoutId::kQ4, LayoutId::kQ6, 64));
  for (const uint32_t second_rows : {1u, 500u, 4096u, 100000u}) {
    const ManyRowsLaunches launches =
        choose_many_rows(kH100, LayoutId::kQ4, 12288, LayoutId::kQ6, second_rows, 5376, 64);
    EXPECT_EQ(launches.second.first_block, launches.first.blocks);
    EXPECT_LE(launches.first.blocks + launches.second.blocks, 264u);
    for (const ManyRowsLaunch& launch : {launches.first, launches.second}) {
      EXPECT_GT(launch.blocks, 0u);
      EXPECT_EQ(launch.share_begin(launch.blocks), launch.tiles() * launch.depth);
    }
  }
}

TEST(ManyRowsChoice, TakesHoppersInstructionsFromItsOwnCodeOnly) {
  EXPECT_EQ(matrix_unit_of(90), MatrixUnit::kWgmma);
  for (const uint32_t architecture : {80u, 86u, 89u, 100u, 120u})
    EXPECT_EQ(matrix_unit_of(architecture), MatrixUnit::kMma);
}

TEST(ManyRowsChoice, GivesOlderDevicesWholeTiles) {
  const ManyRowsLaunch launch =
      choose_many_rows({108, 163 << 10}, matrix_unit_of(80), LayoutId::kQ4, 5376, 8192, 100, true);
  EXPECT_EQ(launch.unit, MatrixUnit::kMma);
  EXPECT_EQ(launch.blocks, 21u * 2);
  EXPECT_EQ(launch.column_chunks, 1u);
}

TEST(ManyRowsChoice, OneWorkspaceServesEveryLaunch) {
  for (const uint32_t rows : {9u, 16u, 33u, 64u, 65u, 2000u}) {
    for (const ManyRowsLaunch& launch :
         many_rows_candidates(kH100, MatrixUnit::kWgmma, LayoutId::kQ4, 5376, 21504, rows)) {
      const uint64_t tile_bytes = uint64_t{launch.tile_rows} * launch.tile_tokens * sizeof(float);
      EXPECT_LE(kFlagBytes + launch.sharing_blocks * tile_bytes, many_rows_workspace_bytes(kH100));
    }
  }
}

TEST(ManyRowsChoice, ActivationBlocksHaveOnePlaceForEachValue) {
  constexpr uint32_t kRows = 16, kColumns = 512;
  std::vector<bool> taken(kRows * kColumns);
  for (uint32_t row = 0; row < kRows; ++row) {
    for (uint32_t column = 0; column < kColumns; ++column) {
      const uint64_t at = activation_block_index(row, column, kRows / 8);
      ASSERT_LT(at, taken.size());
      EXPECT_FALSE(taken[at]);
      taken[at] = true;
    }
  }
}

}  // namespace
}  // namespace nibble::cuda
