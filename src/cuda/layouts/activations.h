#pragma once
// Activation rows as matrix-vector kernels read them. Format: docs/formats/cuda-activations.md.
//
// Values are f16, in the order of the tiles: for each 256 columns, for each row, 32 chunks of 8
// consecutive values; chunk 4 step + t serves lane t of a quad. The chunks of odd rows are swapped
// in pairs of steps, so that neighbouring rows lie in different banks of shared memory. Beside
// them, for each 256 columns and each row, the means of the 8 groups of 32 values, each as a sum of
// two f16 (they multiply the minimums of Q4_K and Q5_K, which cancel most of the scales' part).

#include "cuda/layouts/tile.h"

namespace nibble::cuda {

inline constexpr uint32_t kMostRows = 8;  // activation rows that one matrix instruction takes

struct ActivationMeans {
  uint16_t parts[4][2][2];  // f16: [t][0] groups 2t and 2t + 1, [t][1] what their rounding left
};
static_assert(sizeof(ActivationMeans) == 32);

// Where a value lies: an index into the f16 array.
NIBBLE_HOST_DEVICE inline uint64_t activation_index(uint32_t row, uint32_t column, uint32_t rows) {
  const uint32_t in_tile = column % kTileColumns;
  const uint32_t lane_column = in_tile % kLaneColumns;
  const uint32_t step = lane_column / 8 ^ (row & 1);
  const uint32_t chunk = 4 * step + in_tile / kLaneColumns;
  return (uint64_t(column / kTileColumns) * rows + row) * kTileColumns + 8 * chunk + column % 8;
}

// Rows on the device, in chunks of kMostRows: chunk i is laid out as said above, by itself, and
// starts behind the i * kMostRows rows before it. Columns beyond the last one, up to a whole
// tile, are zero from the start; nobody writes them.
struct ActivationRows {
  uint16_t* values;        // f16 [rows, column_tiles * kTileColumns]
  ActivationMeans* means;  // [rows, column_tiles]
  uint32_t rows;
  uint32_t column_tiles;
};

}  // namespace nibble::cuda
