#include "cuda/attention/attention_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <utility>

namespace nibble::cuda {
namespace {

constexpr backend::AttentionShape kSliding{32, 16, 256}, kFull{32, 4, 512};
constexpr DeviceShape kH100{132, 227 << 10}, kA100{108, 163 << 10}, kRtx3060{28, 99 << 10};
constexpr MatrixUnit kUnit = MatrixUnit::kWgmma;

TEST(AttentionChoice, OneRowKeepsEveryMultiprocessorBusy) {
  EXPECT_EQ(choose_attention(kH100, kUnit, kSliding, 1, 1).splits, 8u);
  EXPECT_EQ(choose_attention(kH100, kUnit, kFull, 1, 1).splits, 33u);
}

TEST(AttentionChoice, ManyRowsAreNotSplit) {
  EXPECT_EQ(choose_attention(kH100, kUnit, kSliding, 8, 8).splits, 1u);
  EXPECT_EQ(choose_attention(kH100, kUnit, kFull, 8, 8).splits, 4u);
  EXPECT_EQ(choose_attention(kH100, kUnit, kFull, 64, 64).splits, 1u);
  EXPECT_EQ(choose_attention({1, 99 << 10}, kUnit, kSliding, 1, 1).splits, 1u);
}

TEST(AttentionChoice, QueryHeadsBeyondOneInstructionTakeBlocksOfTheirOwn) {
  EXPECT_EQ(choose_attention(kH100, kUnit, {16, 1, 128}, 1, 1).splits, 66u);
  EXPECT_EQ(choose_attention(kH100, kUnit, {9, 1, 128}, 1, 1).splits, 66u);
}

TEST(AttentionChoice, TilesFitSharedMemory) {
  const auto tile = [](const DeviceShape& device, const backend::AttentionShape& shape) {
    const MmaTile tile =
        kMmaTiles[choose_attention(device, MatrixUnit::kMma, shape, 9, 0).mma_tile];
    EXPECT_LE(tile.shared_bytes(shape.head_dim), device.shared_bytes_per_block);
    return std::pair(tile.queries, tile.pages);
  };
  EXPECT_EQ(tile(kH100, kFull), std::pair(64u, 2u));
  EXPECT_EQ(tile(kA100, kFull), std::pair(64u, 1u));
  EXPECT_EQ(tile(kRtx3060, kFull), std::pair(32u, 1u));
  EXPECT_EQ(tile(kA100, kSliding), std::pair(64u, 2u));
  EXPECT_EQ(tile(kRtx3060, kSliding), std::pair(64u, 1u));
  EXPECT_EQ(tile(kRtx3060, {8, 8, 128}), std::pair(64u, 2u));
}

TEST(AttentionChoice, BlocksThatWaitForEachOtherAreResidentTogether) {
  for (const uint32_t multiprocessors : {1u, 20u, 84u, 132u}) {
    for (uint32_t rows = 1; rows <= 64; ++rows) {
      for (const backend::AttentionShape& shape :
           {kSliding, kFull, backend::AttentionShape{64, 1, 64}}) {
        const AttentionLaunch launch =
            choose_attention({multiprocessors, 99 << 10}, kUnit, shape, rows, rows);
        const uint32_t groups = std::max(1u, shape.query_heads / shape.kv_heads / kQueryColumns);
        const uint32_t blocks = rows * shape.kv_heads * groups * launch.splits;
        EXPECT_TRUE(launch.splits == 1 || blocks <= multiprocessors);
      }
    }
  }
}

TEST(AttentionChoice, WorkspaceHoldsQueriesOfRowsThatAreNotSingle) {
  const uint64_t four_tiles = 4 * 64 * 4 * 512 * 2;  // of 8 rows each, as a cluster takes them
  EXPECT_EQ(attention_workspace_bytes(kFull, {5, 2, 33, kUnit, 0}), four_tiles);
  EXPECT_EQ(attention_workspace_bytes(kFull, {34, 2, 33, kUnit, 0}), four_tiles);
  EXPECT_EQ(attention_workspace_bytes(kFull, {35, 2, 33, kUnit, 0}), 2 * four_tiles);
  EXPECT_EQ(attention_workspace_bytes(kFull, {2, 2, 33, kUnit, 0}), 0u);
}

}  // namespace
}  // namespace nibble::cuda
