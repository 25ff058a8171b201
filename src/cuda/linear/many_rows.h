#pragma once
// Matrix times more activation rows than few_rows.h takes, on the tensor cores.

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "cuda/layouts/activation_blocks.h"
#include "cuda/layouts/layouts.h"
#include "cuda/linear/few_rows.h"

namespace nibble::cuda {

// The work of a launch: output tiles, `tile_rows` weight rows by `tile_tokens` activation rows
// each, one of `column_chunks` equal chunks of the columns deep; neighbours share their weights.
// Tiles [0, whole_tiles) go to the blocks in turn. The others are cut along their columns into
// equal shares, in order, for the first `sharing_blocks` blocks, so that all of them end together.
struct ManyRowsLaunch {
  MatrixUnit unit;
  uint32_t tile_rows;
  uint32_t tile_tokens;
  uint32_t row_blocks;
  uint32_t column_chunks;  // each gives a part of the result, to be added by its reader
  uint32_t depth;          // of a chunk, in tiles of kTileColumns
  uint32_t token_blocks;
  uint32_t whole_tiles;
  uint32_t sharing_blocks;
  uint32_t share, longer_shares;  // what each of them takes; so many take one more
  uint32_t first_block, blocks;   // of the grid

  NIBBLE_HOST_DEVICE constexpr uint32_t tiles() const {
    return row_blocks * column_chunks * token_blocks;
  }
  // Where sharing block `block` begins, in column tiles of the shared tiles one after the other.
  NIBBLE_HOST_DEVICE constexpr uint32_t share_begin(uint32_t block) const {
    return share * block + (block < longer_shares ? block : longer_shares);
  }
};

// Of a weight in one layout, or in two: each has blocks of its own. second.blocks: 0 if none.
struct ManyRowsLaunches {
  ManyRowsLaunch first, second;
};

// The workspace begins with a flag for each block, at the same place whatever the launch's shape:
// launches that share a workspace leave its flags cleared, but not the sums behind them.
inline constexpr uint32_t kMostBlocksSharing = 1024;
inline constexpr uint64_t kFlagBytes = kMostBlocksSharing * sizeof(uint32_t);

// Up to so many tokens the weights' bytes take longer than the arithmetic: each is read once.
inline constexpr uint32_t kStreamTokens = 64;

// Blocks of a multiprocessor: one, which reuses most of what it reads, or two, so that one begins
// and ends while the other works.
constexpr uint32_t many_rows_sharers(uint32_t tile_bytes, bool stream) {
  return tile_bytes <= 6000 && stream ? 2 : 1;
}
// Weight rows that a block takes at a time.
constexpr uint32_t many_rows_tile_rows(uint32_t tile_bytes, bool stream) {
  return tile_bytes <= 6000 && !stream ? 256 : 128;
}

// All launches that may be the best for some weight [matrix_rows, columns] and `rows`.
std::vector<ManyRowsLaunch> many_rows_candidates(const DeviceShape& device, MatrixUnit unit,
                                                 LayoutId layout, uint32_t matrix_rows,
                                                 uint32_t columns, uint32_t rows);

// The best one for up to kStreamTokens rows of a shape, as measured: the table
// measured_choices.inc, which `cuda_gemm_bench --tune --table FILE` writes.
struct MeasuredChoice {
  uint32_t multiprocessors;
  LayoutId layout;
  uint32_t matrix_rows, columns;
  uint32_t column_chunks;
};
std::span<const MeasuredChoice> measured_choices();

// For a weight [matrix_rows, columns] times `rows` activation rows. What was measured, else what
// was best for most shapes.
// in_parts: whether the result may come in several.
ManyRowsLaunch choose_many_rows(const DeviceShape& device, MatrixUnit unit, LayoutId layout,
                                uint32_t matrix_rows, uint32_t columns, uint32_t rows,
                                bool in_parts);

// Whether one kernel takes both layouts.
bool has_many_rows_kernel(MatrixUnit unit, LayoutId first, LayoutId second, uint32_t rows);
// For a weight of `first_rows` rows in one layout and `second_rows` in another one, if so. The
// result comes in one part.
ManyRowsLaunches choose_many_rows(const DeviceShape& device, LayoutId first, uint32_t first_rows,
                                  LayoutId second, uint32_t second_rows, uint32_t columns,
                                  uint32_t rows);

// Enough for every launch on the device.
uint64_t many_rows_workspace_bytes(const DeviceShape& device);

// sum over p of output[p][r][first_output + n]
//   = scales[r] * sum over k of weights[n][k] * activations[r][k]
struct ManyRowsArgs {
  WeightRows weights[2];  // the second may be empty
  ActivationBlocks activations;
  const float* scales;  // [rows]; null: ones
  float* output;        // [column_chunks, rows, output_stride]
  uint32_t output_stride;
  // many_rows_workspace_bytes() of device memory, cleared once before its first use; launches of
  // one stream may share it.
  void* workspace;
};

}  // namespace nibble::cuda
