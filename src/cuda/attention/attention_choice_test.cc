#include "cuda/attention/attention_choice.h"

#include <gtest/gtest.h>

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

TEST(AttentionChoice, WorkspaceHoldsSplitsAndQueriesApart) {
  const AttentionLaunch launch{5, 2, 33};
  const AttentionWorkspace at = attention_workspace(kFull, launch);
  EXPECT_GE(at.partials, at.statistics + 2 * 32 * 33 * 8);
  EXPECT_GE(at.queries, at.partials + 2 * 32 * 33 * 512 * 4);
  EXPECT_EQ(at.bytes, at.queries + 3 * 32 * 512 * 2);
  EXPECT_EQ(at.partials % 16 + at.queries % 16, 0u);
}

}  // namespace
}  // namespace nibble::cuda
