#pragma once
// How kernels write activation rows for the linears to read.

#include <cuda_fp16.h>

#include "cuda/layouts/activation_blocks.h"
#include "cuda/layouts/activations.h"

namespace nibble::cuda {

// Writes the columns [column, column + 8) of a row; `column` is a multiple of 8. The lanes 4i to
// 4i + 3 of a warp hold the four parts of one group of 32 columns and call this together.
__device__ __forceinline__ void store_activations(const ActivationRows& to, uint32_t row,
                                                  uint32_t column, const float (&values)[8]) {
  __half2 halves[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) halves[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  if (to.in_blocks) {
    const uint32_t row_groups = (to.rows + 7) / 8;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const uint64_t at = activation_block_index(row, column + 2 * i, row_groups);
      *reinterpret_cast<__half2*>(to.values + at) = halves[i];
    }
    return;
  }
  *reinterpret_cast<uint4*>(to.values + activation_index(row, column, to.stride())) =
      *reinterpret_cast<const uint4*>(halves);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += __low2float(halves[i]) + __high2float(halves[i]);

  const uint32_t group_lanes = 0xfu << (threadIdx.x % kLanes & ~3u);
  sum += __shfl_xor_sync(group_lanes, sum, 1);
  sum += __shfl_xor_sync(group_lanes, sum, 2);
  if (column % 32 == 0) {
    const float mean = sum / 32;
    const __half rounded = __float2half_rn(mean);
    const uint32_t group = column % kTileColumns / 32;
    auto& parts = to.means[column / kTileColumns * to.stride() + row].parts[group / 2];
    parts[0][group % 2] = __half_as_ushort(rounded);
    parts[1][group % 2] = __half_as_ushort(__float2half_rn(mean - __half2float(rounded)));
  }
}

// Of a row in blocks, where a lane has a whole chunk of 16 bytes: the pairs of columns `column` and
// those 1, 2 and 3 times kLaneColumns behind, in a tile.
__device__ __forceinline__ void store_activation_chunk(const ActivationRows& to, uint32_t row,
                                                       uint32_t column, const __half2 (&pairs)[4]) {
  const uint64_t at = activation_block_index(row, column, (to.rows + 7) / 8);
  *reinterpret_cast<uint4*>(to.values + at) = *reinterpret_cast<const uint4*>(pairs);
}

// store_activations() by a warp whose lanes have a whole tile of a row, in order. In blocks, a
// chunk is of four lanes that are eight apart: they exchange their pairs, so that each stores one.
__device__ __forceinline__ void store_activation_tile(const ActivationRows& to, uint32_t row,
                                                      uint32_t column, const float (&values)[8]) {
  if (!to.in_blocks) return store_activations(to, row, column, values);
  const uint32_t lane = column % kTileColumns / 8, quarter = lane / 8;
  __half2 pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
  const auto exchange = [&](__half2& low, __half2& high, uint32_t bit) {
    const bool is_high = quarter & bit;
    const __half2 other = __shfl_xor_sync(~0u, is_high ? low : high, 8 * bit);
    low = is_high ? other : low;
    high = is_high ? high : other;
  };
  exchange(pairs[0], pairs[2], 2), exchange(pairs[1], pairs[3], 2);
  exchange(pairs[0], pairs[1], 1), exchange(pairs[2], pairs[3], 1);
  store_activation_chunk(to, row, column - quarter * (kLaneColumns - 2), pairs);
}

}  // namespace nibble::cuda
