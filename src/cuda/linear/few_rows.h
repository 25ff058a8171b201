#pragma once
// Matrix times 1 to 8 activation rows, at the speed of the memory that the weights lie in.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "cuda/layouts/activations.h"
#include "cuda/layouts/layouts.h"

namespace nibble::cuda {

// Rows of a weight that are packed in one layout.
struct PackedRows {
  const void* tiles = nullptr;  // Layout[row tiles][column tiles]
  uint32_t rows = 0;
  uint32_t first_output = 0;  // where their outputs stand in a row of the result
};

// y = W x. The result comes in two parts that the reader adds: a block works on a contiguous share
// of the tiles, and where a share ends within a row of tiles, the block that has the row's end
// writes its sums to the second part. So no block waits for another, and the order of additions is
// fixed.
struct FewRowsArgs {
  PackedRows weights[2];  // of the kernel's two layouts; the second may be empty
  uint32_t column_tiles;
  uint32_t rows;                 // of activations, 1 to kMostRows
  uint32_t first_layout_blocks;  // blocks that work on weights[0]
  uint32_t prefetch_tiles;       // that a warp asks the L2 cache for, past its ring, at its start
  const void* activations;       // f16, as in activations.h
  const ActivationMeans* means;  // [column tiles, rows]
  float* output;                 // [2, rows, output_stride]
  uint32_t output_stride;
};

}  // namespace nibble::cuda
