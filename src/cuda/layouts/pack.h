#pragma once
// Packing on the device, from the file's blocks as they were uploaded.

#include <cuda_runtime_api.h>

#include "cuda/layouts/layouts.h"

namespace nibble::cuda {

// Packs the row tiles from `first_row_tile` on of a matrix [rows, columns]: `blocks` are the file's
// blocks of rows [first_row_tile * kTileRows, first_row_tile * kTileRows + block_rows), `tiles` the
// whole packed matrix. All of them in device memory.
void pack_on_device(cudaStream_t stream, LayoutId layout, const void* blocks, uint32_t block_rows,
                    uint32_t columns, uint32_t first_row_tile, void* tiles);

// Packs the rows `row_ids` [rows] of the blocks, one behind the other; null: the first ones.
void pack_rows_on_device(cudaStream_t stream, LayoutId layout, const void* blocks,
                         const int32_t* row_ids, uint32_t rows, uint32_t columns, void* tiles);

}  // namespace nibble::cuda
