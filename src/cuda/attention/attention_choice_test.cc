#include "cuda/attention/attention_choice.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <utility>
#include <vector>

namespace nibble::cuda {
namespace {

constexpr backend::AttentionShape kSliding{32, 16, 256}, kFull{32, 4, 512};
constexpr DeviceShape kH100{132, 227 << 10}, kA100{108, 163 << 10}, kRtx3060{28, 99 << 10};
constexpr MatrixUnit kUnit = MatrixUnit::kWgmma;

KvRows rows_of(const backend::AttentionShape& shape, backend::KvFormat format,
               uint32_t rope_dims = 0) {
  backend::KvLayer layer = {};
  layer.kv_heads = shape.kv_heads;
  if (rope_dims > 0) layer.shared = backend::SharedKvRow{shape.head_dim, rope_dims};
  const uint32_t divisor = 1u << std::countr_zero(shape.head_dim | rope_dims);
  const uint32_t block = format == backend::KvFormat::kF16  ? 0
                         : format == backend::KvFormat::kQ8 ? 32
                                                            : std::min(divisor, 128u);
  layer.row = {format, shape.head_dim + rope_dims, block};
  return kv_rows(layer, shape.head_dim);
}

AttentionLaunch choose(const DeviceShape& device, const backend::AttentionShape& shape,
                       uint32_t rows, uint32_t single_rows, MatrixUnit unit = kUnit,
                       backend::KvFormat format = backend::KvFormat::kF16) {
  return choose_attention(device, unit, shape, rows_of(shape, format), rows, single_rows);
}

TEST(AttentionChoice, OneRowKeepsEveryMultiprocessorBusy) {
  EXPECT_EQ(choose(kH100, kSliding, 1, 1).splits, 8u);
  EXPECT_EQ(choose(kH100, kFull, 1, 1).splits, 33u);
}

TEST(AttentionChoice, ManyRowsAreNotSplit) {
  EXPECT_EQ(choose(kH100, kSliding, 8, 8).splits, 1u);
  EXPECT_EQ(choose(kH100, kFull, 8, 8).splits, 4u);
  EXPECT_EQ(choose(kH100, kFull, 64, 64).splits, 1u);
  EXPECT_EQ(choose({1, 99 << 10}, kSliding, 1, 1).splits, 1u);
}

TEST(AttentionChoice, ManyRowsBlocksShareAMultiprocessor) {
  EXPECT_EQ(choose(kH100, kSliding, 8, 8).sharers, 1u);
  EXPECT_EQ(choose(kH100, kSliding, 9, 9).sharers, 2u);
  EXPECT_EQ(choose(kH100, kFull, 64, 64).sharers, 1u);
  EXPECT_EQ(choose(kA100, kSliding, 64, 64).sharers, 1u);
}

TEST(AttentionChoice, QueryHeadsBeyondOneInstructionTakeBlocksOfTheirOwn) {
  EXPECT_EQ(choose(kH100, {16, 1, 128}, 1, 1).splits, 66u);
  EXPECT_EQ(choose(kH100, {9, 1, 128}, 1, 1).splits, 66u);
}

TEST(AttentionChoice, TilesFitSharedMemory) {
  const auto tile = [](const DeviceShape& device, const backend::AttentionShape& shape) {
    const MmaTile tile = kMmaTiles[choose(device, shape, 9, 0, MatrixUnit::kMma).mma_tile];
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

TEST(AttentionChoice, CompressedRowsTakeWhatFitsEveryDevice) {
  for (const backend::AttentionShape& shape : {kSliding, kFull}) {
    for (const auto format : {backend::KvFormat::kQ8, backend::KvFormat::kTq4}) {
      const AttentionLaunch launch = choose(kH100, shape, 9, 0, kUnit, format);
      EXPECT_EQ(launch.mma_tile, choose(kRtx3060, shape, 9, 0, kUnit, format).mma_tile);
    }
  }
}

TEST(AttentionChoice, TeamsServeWhatWholeWarpsDoNot) {
  const auto in_teams = [](const DeviceShape& device, const KvRows& rows) {
    return choose_attention(device, kUnit, kFull, rows, 1, 1).decode.warps > 0;
  };
  EXPECT_FALSE(in_teams(kH100, rows_of(kFull, backend::KvFormat::kF16)));
  EXPECT_TRUE(in_teams(kA100, rows_of(kFull, backend::KvFormat::kF16)));
  EXPECT_TRUE(in_teams(kH100, rows_of(kFull, backend::KvFormat::kF16, 128)));
  EXPECT_TRUE(in_teams(kH100, rows_of(kFull, backend::KvFormat::kQ8)));
  EXPECT_TRUE(in_teams(kH100, rows_of(kFull, backend::KvFormat::kTq4)));
}

TEST(AttentionChoice, DecodeFitsSharedMemory) {
  for (const DeviceShape& device : {kH100, kA100, kRtx3060}) {
    for (const uint32_t head_dim : {64u, 128u, 256u, 512u}) {
      for (const auto format :
           {backend::KvFormat::kF16, backend::KvFormat::kQ8, backend::KvFormat::kTq4}) {
        for (const uint32_t rope_dims : {0u, head_dim / 2}) {
          const backend::AttentionShape shape{16, 2, head_dim};
          const KvRows rows = rows_of(shape, format, rope_dims);
          const DecodeShape at = decode_shape(device, shape, rows);
          EXPECT_LE(at.bytes, device.shared_bytes_per_block);
          EXPECT_GE(at.warps, head_dim / part_dims(head_dim));
          EXPECT_EQ(at.warps % (head_dim / part_dims(head_dim)), 0u);
        }
      }
    }
  }
}

// Four lanes read a block of one row in one piece, as many rows at once as fill all banks.
TEST(AttentionChoice, RowsOfBlocksLieInDifferentBanks) {
  for (const uint32_t head_dim : {64u, 128u, 256u, 512u}) {
    for (const uint32_t block : {32u, 64u, 128u}) {
      for (const auto format : {backend::KvFormat::kQ8, backend::KvFormat::kTq4}) {
        if (block > part_dims(head_dim) || (format == backend::KvFormat::kQ8 && block > 32))
          continue;
        const uint32_t piece = part_row_bytes(format, head_dim) / (part_dims(head_dim) / block);
        const uint32_t stride = part_row_stride(format, head_dim, block);
        std::vector<bool> taken(128 / piece);
        for (uint32_t row = 0; row < taken.size(); ++row) {
          EXPECT_FALSE(taken[row * stride % 128 / piece]) << head_dim << ", block " << block;
          taken[row * stride % 128 / piece] = true;
        }
        EXPECT_EQ(stride % 16, 0u);  // what is copied at a time
      }
    }
  }
}

TEST(AttentionChoice, BlocksThatWaitForEachOtherAreResidentTogether) {
  for (const uint32_t multiprocessors : {1u, 20u, 84u, 132u}) {
    for (uint32_t rows = 1; rows <= 64; ++rows) {
      for (const backend::AttentionShape& shape :
           {kSliding, kFull, backend::AttentionShape{64, 1, 64}}) {
        const AttentionLaunch launch = choose({multiprocessors, 99 << 10}, shape, rows, rows);
        const uint32_t groups = std::max(1u, shape.query_heads / shape.kv_heads / kQueryColumns);
        const uint32_t blocks = rows * shape.kv_heads * groups * launch.splits;
        EXPECT_TRUE(launch.splits == 1 || blocks <= multiprocessors);
      }
    }
  }
}

TEST(AttentionChoice, CompressedKeysAreExpandedInWhatThereIs) {
  const AttentionLaunch launch = choose(kH100, kFull, 512, 0, kUnit, backend::KvFormat::kTq4);
  const KvRows rows = rows_of(kFull, backend::KvFormat::kTq4);
  constexpr uint64_t kPage = 2 * 4 * 32 * 512 * 2, kState = 4 * 64 * (64 * 512 * 4 + 2048);
  const auto sections = [&](uint32_t chunks, uint32_t pages, uint64_t bytes) {
    return choose_sections(kFull, rows, launch, chunks, chunks, pages, 128, bytes);
  };
  constexpr uint64_t kTable = 1024;
  const KeySections all = sections(1, 1000, kTable + 1000 * kPage);  // nothing to hand over
  EXPECT_EQ(all.pages, 1000u);
  EXPECT_EQ(all.pages_at, kTable);
  const KeySections some = sections(1, 1000, kState + kTable + 51 * kPage);
  EXPECT_EQ(some.pages, 48u);  // whole tiles of keys
  EXPECT_EQ(some.table_at, kState);
  EXPECT_EQ(some.pages_at, kState + kTable);
  EXPECT_EQ(sections(2, 1000, kState + 2 * kTable + 32 * kPage).pages, 16u);
  EXPECT_EQ(sections(1, 1000, kState + kTable + 7 * kPage).pages, 0u);
  EXPECT_EQ(sections(1, 1000, 0).pages, 0u);
  EXPECT_EQ(sections(17, 1000, uint64_t{1} << 40).pages,
            0u);  // 30 rows would share what is expanded
  EXPECT_EQ(sections(0, 0, uint64_t{1} << 40).pages, 0u);
}

TEST(AttentionChoice, WorkspaceHoldsQueriesOfRowsThatAreNotSingle) {
  const uint64_t four_tiles = 4 * 64 * 4 * 512 * 2;  // of 8 rows each, as a cluster takes them
  EXPECT_EQ(attention_workspace_bytes(kFull, {.rows = 5, .single_rows = 2}), four_tiles);
  EXPECT_EQ(attention_workspace_bytes(kFull, {.rows = 34, .single_rows = 2}), four_tiles);
  EXPECT_EQ(attention_workspace_bytes(kFull, {.rows = 35, .single_rows = 2}), 2 * four_tiles);
  EXPECT_EQ(attention_workspace_bytes(kFull, {.rows = 2, .single_rows = 2}), 0u);
}

}  // namespace
}  // namespace nibble::cuda
