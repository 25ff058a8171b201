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

}  // namespace nibble::cuda
