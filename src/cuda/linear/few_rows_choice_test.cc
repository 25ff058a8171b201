#include <gtest/gtest.h>

#include "base/error.h"
#include "cuda/linear/few_rows.h"

namespace nibble::cuda {
namespace {

constexpr DeviceShape kH100{132, 227 << 10};
constexpr DeviceShape kA100{108, 163 << 10};
constexpr DeviceShape kRtx3060{28, 99 << 10};

struct Case {
  DeviceShape device;
  LayoutId layout;
  uint32_t matrix_rows, columns, rows;
  bool wide;
  uint32_t blocks, column_chunks;
};

TEST(FewRowsChoice, FollowsTheTable) {
  const Case cases[] = {
      // The 31B model's matrices, one row.
      {kH100, LayoutId::kQ4, 43008, 5376, 1, true, 132, 1},
      {kH100, LayoutId::kQ4, 5376, 21504, 1, true, 132, 1},
      {kH100, LayoutId::kQ6, 5376, 21504, 1, true, 132, 1},
      {kH100, LayoutId::kQ6, 262144, 5376, 1, true, 132, 1},
      {kH100, LayoutId::kQ4, 16384, 5376, 1, true, 132, 1},
      {kH100, LayoutId::kQ4, 5376, 16384, 1, true, 132, 1},
      {kH100, LayoutId::kQ4, 5376, 8192, 1, false, 264, 1},  // too few tiles for wide blocks
      // More rows: their activations must fit beside the ring.
      {kH100, LayoutId::kQ4, 43008, 5376, 8, true, 132, 1},
      {kH100, LayoutId::kQ4, 5376, 21504, 8, true, 132, 4},
      {kH100, LayoutId::kQ4, 43008, 5376, 16, true, 132, 2},
      {kH100, LayoutId::kQ4, 43008, 5376, 17, true, 132, 3},
      {kH100, LayoutId::kQ6, 5376, 21504, 16, true, 132, 7},
      {kH100, LayoutId::kQ4, 5376, 8192, 32, true, 132, 5},
      {kH100, LayoutId::kF16, 5376, 21504, 1, true, 132, 1},
      // Small matrices: no more blocks than row tiles.
      {kH100, LayoutId::kQ4, 100, 256, 1, false, 7, 1},
      {kA100, LayoutId::kQ4, 43008, 5376, 1, true, 108, 1},
      {kRtx3060, LayoutId::kQ4, 43008, 5376, 1, false, 56, 2},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message() << c.matrix_rows << " x " << c.columns << ", " << c.rows);
    const FewRowsLaunch launch =
        choose_few_rows(c.device, c.layout, c.matrix_rows, {}, 0, c.columns, c.rows);
    EXPECT_EQ(launch.wide, c.wide);
    EXPECT_EQ(launch.blocks, c.blocks);
    EXPECT_EQ(launch.first_blocks, c.blocks);
    EXPECT_EQ(launch.column_chunks, c.column_chunks);
    EXPECT_LE(launch.shared_bytes, c.device.shared_bytes_per_block);
  }
}

// What the kernel relies on: it never needs a third part.
TEST(FewRowsChoice, GivesEachBlockAtLeastOneRowTile) {
  for (const uint32_t matrix_rows : {1u, 16u, 17u, 300u, 5000u}) {
    for (const uint32_t columns : {256u, 320u, 5376u, 262144u}) {
      for (uint32_t rows = 1; rows <= kMostRows; ++rows) {
        const FewRowsLaunch launch =
            choose_few_rows(kH100, LayoutId::kQ6, matrix_rows, {}, 0, columns, rows);
        const uint32_t blocks_per_chunk =
            (launch.blocks + launch.column_chunks - 1) / launch.column_chunks;
        EXPECT_GE(launch.blocks, launch.column_chunks);
        EXPECT_LE(blocks_per_chunk, TileGrid(matrix_rows, columns).row_tiles);
      }
    }
  }
}

// Then results have the same bits.
TEST(FewRowsChoice, TakesTheSameShapeForBlocks) {
  for (uint32_t id = 0; id < kLayoutCount; ++id) {
    for (const DeviceShape& device : {kH100, kA100}) {
      for (const uint32_t matrix_rows : {100u, 5376u, 43008u}) {
        const auto choose = [&](backend::WeightStorage storage) {
          return choose_few_rows(device, LayoutId(id), matrix_rows, {}, 0, 5376, 1, storage);
        };
        const FewRowsLaunch packed = choose(backend::WeightStorage::kPacked);
        const FewRowsLaunch direct = choose(backend::WeightStorage::kDirect);
        EXPECT_EQ(direct.wide, packed.wide) << id;
        EXPECT_EQ(direct.blocks, packed.blocks) << id;
        EXPECT_EQ(direct.column_chunks, packed.column_chunks) << id;
        EXPECT_GE(direct.shared_bytes, packed.shared_bytes) << id;
        EXPECT_LE(direct.shared_bytes, device.shared_bytes_per_block) << id;
      }
    }
  }
}

TEST(FewRowsChoice, FindsRoomOnSmallDevices) {
  for (uint32_t id = 0; id < kLayoutCount; ++id) {
    for (const auto storage : {backend::WeightStorage::kPacked, backend::WeightStorage::kDirect}) {
      for (uint32_t rows = 1; rows <= most_few_rows(kRtx3060); ++rows) {
        const FewRowsLaunch launch =
            choose_few_rows(kRtx3060, LayoutId(id), 5376, {}, 0, 21504, rows, storage);
        EXPECT_LE(launch.shared_bytes, kRtx3060.shared_bytes_per_block) << id;
      }
    }
  }
}

TEST(FewRowsChoice, SharesBlocksByBytesBetweenTwoLayouts) {
  const FewRowsLaunch launch =
      choose_few_rows(kH100, LayoutId::kQ4, 12288, LayoutId::kQ6, 4096, 5376, 1);
  EXPECT_EQ(launch.blocks, 132u);
  const double first_bytes = 12288 * 0.5625, second_bytes = 4096 * 0.8203125;
  EXPECT_NEAR(launch.first_blocks, 132 * first_bytes / (first_bytes + second_bytes), 1);
}

TEST(FewRowsChoice, TakesMoreRowsWhereSharedMemoryHoldsThem) {
  EXPECT_EQ(most_few_rows(kH100), kMostRows);
  EXPECT_EQ(most_few_rows(kA100), kMatrixTokens);
  EXPECT_EQ(most_few_rows(kRtx3060), kMatrixTokens);
}

TEST(FewRowsChoice, RefusesADeviceWithTooLittleSharedMemory) {
  EXPECT_THROW(choose_few_rows({4, 16 << 10}, LayoutId::kQ4, 256, {}, 0, 256, 1), Error);
}

}  // namespace
}  // namespace nibble::cuda
