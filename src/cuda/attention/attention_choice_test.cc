#include "cuda/attention/attention_choice.h"

#include <gtest/gtest.h>

#include <algorithm>

namespace nibble::cuda {
namespace {

constexpr backend::AttentionShape kSliding{32, 16, 256}, kFull{32, 4, 512};

TEST(AttentionChoice, OneRowKeepsEveryMultiprocessorBusy) {
  EXPECT_EQ(choose_attention(132, kSliding, 1, 1).splits, 8u);
  EXPECT_EQ(choose_attention(132, kFull, 1, 1).splits, 33u);
}

TEST(AttentionChoice, ManyRowsAreNotSplit) {
  EXPECT_EQ(choose_attention(132, kSliding, 8, 8).splits, 1u);
  EXPECT_EQ(choose_attention(132, kFull, 8, 8).splits, 4u);
  EXPECT_EQ(choose_attention(132, kFull, 64, 64).splits, 1u);
  EXPECT_EQ(choose_attention(1, kSliding, 1, 1).splits, 1u);
}

TEST(AttentionChoice, QueryHeadsBeyondOneInstructionTakeBlocksOfTheirOwn) {
  EXPECT_EQ(choose_attention(132, {16, 1, 128}, 1, 1).splits, 66u);
  EXPECT_EQ(choose_attention(132, {9, 1, 128}, 1, 1).splits, 66u);
}

TEST(AttentionChoice, BlocksThatWaitForEachOtherAreResidentTogether) {
  for (const uint32_t multiprocessors : {1u, 20u, 84u, 132u}) {
    for (uint32_t rows = 1; rows <= 64; ++rows) {
      for (const backend::AttentionShape& shape :
           {kSliding, kFull, backend::AttentionShape{64, 1, 64}}) {
        const AttentionLaunch launch = choose_attention(multiprocessors, shape, rows, rows);
        const uint32_t groups = std::max(1u, shape.query_heads / shape.kv_heads / kQueryColumns);
        const uint32_t blocks = rows * shape.kv_heads * groups * launch.splits;
        EXPECT_TRUE(launch.splits == 1 || blocks <= multiprocessors);
      }
    }
  }
}

TEST(AttentionChoice, WorkspaceHoldsQueriesOfRowsThatAreNotSingle) {
  EXPECT_EQ(attention_workspace_bytes(kFull, {5, 2, 33}), 3 * 32 * 512 * 2u);
  EXPECT_EQ(attention_workspace_bytes(kFull, {2, 2, 33}), 0u);
}

}  // namespace
}  // namespace nibble::cuda
