#pragma once
// The kernel of many_rows.h for devices without Hopper's matrix instructions: the same tiles and
// fragments, one tile a block. Warps read their weights straight from global memory; activations
// come through a ring in shared memory, as they lie in global memory.

#include "cuda/linear/many_rows.h"
#include "cuda/linear/many_rows_fragments.cuh"

namespace nibble::cuda {

inline constexpr uint32_t kMmaTokens = kStreamTokens;
inline constexpr uint32_t kMmaWarps = 8;
inline constexpr uint32_t kMmaThreads = kMmaWarps * kLanes;
inline constexpr uint32_t kMmaStages = 4;

// Four 8 x 8 matrices; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ uint4 load_matrices(const void* row) {
  uint4 result;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(result.x), "=r"(result.y), "=r"(result.z), "=r"(result.w)
               : "r"(ptx::shared_address(row))
               : "memory");
  return result;
}

template <class Layout>
__global__ void __launch_bounds__(kMmaThreads)
    many_rows_mma(const __grid_constant__ ManyRowsArgs args,
                  const __grid_constant__ ManyRowsLaunch launch) {
  constexpr uint32_t kWarpTiles =
      many_rows_tile_rows(sizeof(Layout), false) / kTileRows / kMmaWarps;
  constexpr uint32_t kStageChunks = kMmaTokens * kBlockColumns / 8;  // of 16 bytes
  __shared__ uint4 ring[kMmaStages][kStageChunks];
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t depth = args.activations.column_tiles;
  const uint32_t blocks = depth * (kTileColumns / kBlockColumns);

  const uint32_t first_token = blockIdx.x % launch.token_blocks * kMmaTokens;
  const uint32_t row_groups = args.activations.row_groups();
  const uint32_t chunks = min(row_groups * 8 - first_token, kMmaTokens) * (kBlockColumns / 8);
  const uint4* const activations = reinterpret_cast<const uint4*>(args.activations.values);
  const auto ask = [&](uint32_t block) {
    const uint4* const from =
        activations + (uint64_t(block) * row_groups * 8 + first_token) * (kBlockColumns / 8);
    for (uint32_t i = threadIdx.x; block < blocks && i < chunks; i += kMmaThreads)
      ptx::copy_async_16(&ring[block % kMmaStages][i], from + i);
    ptx::copy_async_commit();
  };
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  for (uint32_t i = 0; i + 1 < kMmaStages; ++i) ask(i);

  // Row tiles that do not exist repeat the last one.
  const uint32_t first_tile = (blockIdx.x / launch.token_blocks * kMmaWarps + warp) * kWarpTiles;
  const uint32_t row_tiles = (args.weights[0].rows + kTileRows - 1) / kTileRows;
  const Layout* tiles[kWarpTiles];
  for (uint32_t i = 0; i < kWarpTiles; ++i) {
    tiles[i] = static_cast<const Layout*>(args.weights[0].data) +
               uint64_t(min(first_tile + i, row_tiles - 1)) * depth;
  }

  float sums[kWarpTiles][kMmaTokens / 8][4] = {};
  for (uint32_t column = 0; column < depth; ++column) {
    TileScales<Layout> scales[kWarpTiles];
#pragma unroll
    for (int i = 0; i < kWarpTiles; ++i) scales[i].load(tiles[i][column], lane);
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      HalfTile<Layout> half[kWarpTiles];
#pragma unroll
      for (int i = 0; i < kWarpTiles; ++i) half[i].load(tiles[i][column], lane, group);
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const uint32_t block = 4 * column + 2 * group + part;
        ptx::copy_async_wait<kMmaStages - 2>();
        __syncthreads();
        ask(block + kMmaStages - 1);
        const uint4* const stage = ring[block % kMmaStages];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          __half2 left[kWarpTiles][4];
#pragma unroll
          for (int j = 0; j < kWarpTiles; ++j)
            half[j].weights(scales[j], group, 2 * part + i / 2, i % 2, left[j]);
            // Chunks 2 i and 2 i + 1 of 16 tokens are the right operands of two instructions.
#pragma unroll
          for (int tokens = 0; tokens < kMmaTokens / 16; ++tokens) {
            const uint32_t token = 16 * tokens + lane / 16 * 8 + lane % 8;
            const uint4 right =
                load_matrices(&stage[token * 8 + ((2 * i + lane / 8 % 2) ^ token % 8)]);
#pragma unroll
            for (int j = 0; j < kWarpTiles; ++j) {
              ptx::multiply_add(sums[j][2 * tokens], left[j], right.x, right.y);
              ptx::multiply_add(sums[j][2 * tokens + 1], left[j], right.z, right.w);
            }
          }
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kMmaTokens / 8; ++i) {
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t token = first_token + 8 * i + lane % 4 * 2 + k;
      if (token >= args.activations.rows) continue;
      const float scale = args.scales ? args.scales[token] : 1.0f;
      float* const output =
          args.output + uint64_t(token) * args.output_stride + args.weights[0].first_output;
#pragma unroll
      for (int j = 0; j < kWarpTiles; ++j) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const uint32_t row = (first_tile + j) * kTileRows + lane / 4 + 8 * half;
          if (row < args.weights[0].rows) output[row] = scale * sums[j][i][2 * half + k];
        }
      }
    }
  }
}

}  // namespace nibble::cuda
