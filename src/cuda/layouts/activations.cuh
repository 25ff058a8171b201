#pragma once
// How kernels write activation rows for the linears to read.

#include <cuda_fp16.h>

#include "cuda/layouts/activations.h"

namespace nibble::cuda {

// Writes the columns [column, column + 8) of a row; `column` is a multiple of 8. The lanes 4i to
// 4i + 3 of a warp hold the four parts of one group of 32 columns and call this together.
__device__ __forceinline__ void store_activations(const ActivationRows& to, uint32_t row,
                                                  uint32_t column, const float (&values)[8]) {
  const uint32_t first = row / kMostRows * kMostRows;
  const uint32_t rows = min(to.rows - first, kMostRows);
  const uint64_t before = uint64_t(first) * to.column_tiles;
  __half2 halves[4];
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    halves[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    sum += __low2float(halves[i]) + __high2float(halves[i]);
  }
  *reinterpret_cast<uint4*>(to.values + before * kTileColumns +
                            activation_index(row - first, column, rows)) =
      *reinterpret_cast<const uint4*>(halves);

  const uint32_t group_lanes = 0xfu << (threadIdx.x % kLanes & ~3u);
  sum += __shfl_xor_sync(group_lanes, sum, 1);
  sum += __shfl_xor_sync(group_lanes, sum, 2);
  if (column % 32 == 0) {
    const float mean = sum / 32;
    const __half rounded = __float2half_rn(mean);
    const uint32_t group = column % kTileColumns / 32;
    auto& parts = to.means[before + column / kTileColumns * rows + row - first].parts[group / 2];
    parts[0][group % 2] = __half_as_ushort(rounded);
    parts[1][group % 2] = __half_as_ushort(__float2half_rn(mean - __half2float(rounded)));
  }
}

}  // namespace nibble::cuda
