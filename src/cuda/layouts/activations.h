#pragma once
// Activation rows as the linears read them: few in the order of the matrix-vector kernels
// (docs/formats/cuda-activations.md), more in blocks (activation_blocks.h).
//
// Of few rows, values are f16, in the order of the tiles: for each 256 columns, for each row, 32
// chunks of 8 consecutive values; chunk 4 step + t serves lane t of a quad. The chunks of odd rows
// are swapped in pairs of steps, so that neighbouring rows lie in different banks of shared memory.
// Beside them, for each 256 columns and each row, the means of the 8 groups of 32 values, each as a
// sum of two f16 (they multiply the minimums of Q4_K and Q5_K, which cancel most of the scales'
// part).

#include "cuda/layouts/tile.h"

namespace nibble::cuda {

inline constexpr uint32_t kMatrixTokens = 8;  // activation rows that one matrix instruction takes
inline constexpr uint32_t kMostRows = 32;     // of matrix-vector kernels

// Rows for which there is room: those beyond the last one may hold anything.
NIBBLE_HOST_DEVICE constexpr uint32_t activation_stride(uint32_t rows) {
  return rows <= kMatrixTokens ? rows : rows <= 2 * kMatrixTokens ? 2 * kMatrixTokens : kMostRows;
}

struct ActivationMeans {
  uint16_t parts[4][2][2];  // f16: [t][0] groups 2t and 2t + 1, [t][1] what their rounding left
};
static_assert(sizeof(ActivationMeans) == 32);

// Where a value lies: an index into the f16 array. stride: activation_stride(rows)
NIBBLE_HOST_DEVICE inline uint64_t activation_index(uint32_t row, uint32_t column,
                                                    uint32_t stride) {
  const uint32_t in_tile = column % kTileColumns;
  const uint32_t lane_column = in_tile % kLaneColumns;
  const uint32_t step = lane_column / 8 ^ (row & 1);
  const uint32_t chunk = 4 * step + in_tile / kLaneColumns;
  return (uint64_t(column / kTileColumns) * stride + row) * kTileColumns + 8 * chunk + column % 8;
}

// Rows on the device. Columns beyond the last one, up to a whole tile, are zero.
struct ActivationRows {
  uint16_t* values;        // f16 [column_tiles, stride], or blocks
  ActivationMeans* means;  // [column_tiles, stride]; of blocks there are none
  uint32_t rows;
  uint32_t column_tiles;
  bool in_blocks = false;

  NIBBLE_HOST_DEVICE uint32_t stride() const { return activation_stride(rows); }
};

}  // namespace nibble::cuda
