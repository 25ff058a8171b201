#pragma once
// How the rows of a step are shared among attention's blocks. No CUDA toolkit needed.

#include <cstdint>

#include "backend/plan.h"

namespace nibble::cuda {

// Keys that a warp takes at a time.
inline constexpr uint32_t kKeyTile = 16;
// Query heads of one KV head that a decode block takes: the columns of one matrix instruction.
inline constexpr uint32_t kQueryColumns = 8;
// Queries (tokens x heads of one KV head) that a prefill block takes.
inline constexpr uint32_t kQueryTile = 64;

// Fixed when a step is captured: depends on sizes alone, never on positions.
struct AttentionLaunch {
  uint32_t rows;
  // Rows [0, single_rows) are each the only one of its sequence in the step: norms, RoPE and
  // storing are part of their attention kernel, and their keys are split over `splits` blocks.
  uint32_t single_rows;
  uint32_t splits;
};

// One block a multiprocessor, whatever the length of the sequences.
AttentionLaunch choose_attention(uint32_t multiprocessors, const backend::AttentionShape& shape,
                                 uint32_t rows, uint32_t single_rows);

// Where the parts of the workspace begin, and where it ends. Pure, so that host and kernels agree.
struct AttentionWorkspace {
  uint64_t statistics;  // float2 [single_rows, query_heads, splits]: largest score, sum
  uint64_t partials;    // float [single_rows, query_heads, splits, head_dim]
  uint64_t queries;     // f16 [rows - single_rows, query_heads, head_dim]
  uint64_t bytes;
};
AttentionWorkspace attention_workspace(const backend::AttentionShape& shape,
                                       const AttentionLaunch& launch);

}  // namespace nibble::cuda
