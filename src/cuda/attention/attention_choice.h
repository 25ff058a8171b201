#pragma once
// How the rows of a step are shared among attention's blocks. No CUDA toolkit needed.

#include <cstdint>

#include "backend/kv_format.h"
#include "backend/plan.h"
#include "cuda/device_shape.h"

namespace nibble::cuda {

// Keys that a warp takes at a time.
inline constexpr uint32_t kKeyTile = 16;
// Query heads of one KV head that a decode block takes: the columns of one matrix instruction.
inline constexpr uint32_t kQueryColumns = 8;
// Queries (tokens x heads of one KV head) that a prefill block takes.
inline constexpr uint32_t kQueryTile = 64;

// What a block of the mma.sync prefill kernel takes at a time: queries of a tile, and so many pages
// of keys and of values.
struct MmaTile {
  uint32_t queries, pages;

  constexpr uint32_t threads() const { return queries * 4; }
  constexpr uint32_t shared_bytes(uint32_t head_dim) const {
    const uint32_t weights = queries * (backend::kKvPageTokens * 2 + 16);
    return (queries + 2 * pages * backend::kKvPageTokens) * head_dim * 2 + weights + queries * 8;
  }
};
// Largest first.
inline constexpr MmaTile kMmaTiles[] = {{kQueryTile, 2}, {kQueryTile, 1}, {kQueryTile / 2, 1}};

// Fixed when a step is captured: depends on sizes alone, never on positions.
struct AttentionLaunch {
  uint32_t rows;
  // Rows [0, single_rows) are each the only one of its sequence in the step: norms, RoPE and
  // storing are part of their attention kernel, and their keys are split over `splits` blocks.
  uint32_t single_rows;
  uint32_t splits;
  // Of the other rows' kernel:
  MatrixUnit unit;
  uint32_t mma_tile;  // index into kMmaTiles
};

// One block of a single row's kernel a multiprocessor, whatever the length of the sequences. Where
// keys are split there is no more than that: the blocks wait for each other.
AttentionLaunch choose_attention(const DeviceShape& device, MatrixUnit unit,
                                 const backend::AttentionShape& shape, uint32_t rows,
                                 uint32_t single_rows);

// Rows whose queries of one KV head share a tile.
constexpr uint32_t query_tile_tokens(const backend::AttentionShape& shape) {
  return kQueryTile / (shape.query_heads / shape.kv_heads);
}

// What a block found for one query and 32 columns, to be merged with other splits' (merge.cuh).
inline constexpr uint32_t kPartColumns = 32;
struct alignas(16) SplitPart {
  float values[kPartColumns];  // sums of weighted values, weights relative to `largest`
  float largest, sum;          // score, of the weights
  float unused[2];
};
static_assert(sizeof(SplitPart) == 144);

// Parts that any launch of choose_attention() can need.
uint64_t most_split_parts(uint32_t multiprocessors);

// Bytes of the workspace: the f16 queries of rows [single_rows, rows), tiles as QueryTiles says.
uint64_t attention_workspace_bytes(const backend::AttentionShape& shape,
                                   const AttentionLaunch& launch);

}  // namespace nibble::cuda
