#pragma once
// Activation rows as the matrix-matrix kernels read them. Format:
// docs/formats/cuda-activation-blocks.md.

#include "cuda/layouts/tile.h"

namespace nibble::cuda {

inline constexpr uint32_t kBlockColumns = 64;  // columns that one pipeline stage takes

// f16 rows on the device. Columns beyond the last one, up to a whole tile, are zero; rows beyond
// the last one, up to a multiple of 8, exist and may hold anything.
struct ActivationBlocks {
  uint16_t* values;  // [column_tiles * 4][row_groups()][8][64]
  uint32_t rows;
  uint32_t column_tiles;

  NIBBLE_HOST_DEVICE uint32_t row_groups() const { return (rows + 7) / 8; }
  NIBBLE_HOST_DEVICE uint64_t size() const {
    return uint64_t(column_tiles) * row_groups() * 8 * kTileColumns;
  }
};

// Where a value lies: an index into the array. A block of 64 takes the steps 2b and 2b + 1 of the
// tile's four lanes (pair_place), chunk by chunk in the order of the matrix instructions; chunk c
// of row r stands at c ^ (r % 8), which is how they like their shared memory.
NIBBLE_HOST_DEVICE inline uint64_t activation_block_index(uint32_t row, uint32_t column,
                                                          uint32_t row_groups) {
  const uint32_t in_tile = column % kTileColumns;
  const uint32_t lane = in_tile / kLaneColumns;
  const PairPlace place = pair_place(in_tile % kLaneColumns);
  const uint32_t block = column / kTileColumns * (kTileColumns / kBlockColumns) + place.step / 2;
  const uint32_t chunk = (4 * (place.step % 2) + place.pair) ^ (row % 8);
  return (uint64_t(block) * row_groups * 8 + row) * kBlockColumns + 8 * chunk + 2 * lane +
         place.high;
}

}  // namespace nibble::cuda
