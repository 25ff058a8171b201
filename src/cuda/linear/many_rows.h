#pragma once
// Matrix times 9 and more activation rows, on the tensor cores.

#include <cstddef>
#include <cstdint>

#include "cuda/layouts/layouts.h"
#include "cuda/linear/few_rows.h"
#include "cuda/linear/many_rows_activations.h"

namespace nibble::cuda {

// The work of a launch: output tiles, `tile_rows` weight rows by `tile_tokens` activation rows
// each, all of the columns deep; neighbours share their weights. Tiles [0, whole_tiles) go to the
// blocks in turn. The others, fewer than there are blocks, are cut along their columns into equal
// shares for the first `sharing_blocks` blocks, so that all of them end together.
struct ManyRowsLaunch {
  MatrixUnit unit;
  uint32_t tile_rows;
  uint32_t tile_tokens;
  uint32_t row_blocks;
  uint32_t token_blocks;
  uint32_t whole_tiles;
  uint32_t sharing_blocks;
  uint32_t blocks;
  uint64_t workspace_bytes;  // for the sums of tiles that blocks share

  constexpr uint32_t tiles() const { return row_blocks * token_blocks; }
};

// The workspace begins with a flag for each block, at the same place whatever the launch's shape:
// launches that share a workspace leave its flags cleared, but not the sums behind them.
inline constexpr uint32_t kMostBlocksSharing = 1024;
inline constexpr uint64_t kFlagBytes = kMostBlocksSharing * sizeof(uint32_t);

// Weight rows that a block of the layout takes at a time.
constexpr uint32_t many_rows_tile_rows(uint32_t tile_bytes) {
  return tile_bytes <= 6000 ? 256 : 128;
}

// For a weight [matrix_rows, columns] times `rows` activation rows.
ManyRowsLaunch choose_many_rows(const DeviceShape& device, MatrixUnit unit, LayoutId layout,
                                uint32_t matrix_rows, uint32_t columns, uint32_t rows);

// output[r][first_output + n] = scales[r] * sum over k of weights[n][k] * activations[r][k]
struct ManyRowsArgs {
  WeightRows weights;
  ActivationBlocks activations;
  const float* scales;  // [rows]; null: ones
  float* output;        // [rows, output_stride]
  uint32_t output_stride;
  // launch.workspace_bytes of device memory, cleared once before its first use; launches of one
  // stream may share it.
  void* workspace;
};

}  // namespace nibble::cuda
