#pragma once
// What the kernels of single rows have in common: which part of the work a block has, and what
// becomes of its results.

#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/merge.cuh"

namespace nibble::cuda {

// Splits that a lane merges at a time. The largest heads come with the fewest KV heads and so with
// the most splits.
template <uint32_t kHeadDim>
inline constexpr uint32_t kMergeBatch = kHeadDim <= 256 ? 2 : 9;

// Which part of the work a block has. The grid is [splits, KV heads x groups of their queries,
// rows].
struct DecodeBlock {
  uint32_t row, kv_head, first_query, queries, split;
  bool leads_kv_head;  // has the first of its queries
  uint32_t index;      // among the blocks of this split

  __device__ explicit DecodeBlock(const backend::AttentionShape& shape)
      : row(blockIdx.z), split(blockIdx.x), index(blockIdx.z * gridDim.y + blockIdx.y) {
    const uint32_t ratio = shape.query_heads / shape.kv_heads;
    const uint32_t groups = gridDim.y / shape.kv_heads;
    kv_head = blockIdx.y / groups;
    const uint32_t group = blockIdx.y % groups;
    first_query = kv_head * ratio + group * kQueryColumns;
    queries = min(ratio - group * kQueryColumns, kQueryColumns);
    leads_kv_head = group == 0;
  }
};

// A warp's running softmax over its tiles. Lane 4 g + t has the queries 2t and 2t + 1.
// kWeightBits: weights are so many powers of two larger.
template <int kTiles, int kWeightBits = 0>
struct DecodeState {
  static constexpr int kDimTiles = kTiles;
  float results[kTiles][4];  // rows g and g + 8 of a tile of dimensions, by the queries
  float largest[2];
  float sums[2];  // of the keys of rows g and g + 8 alone

  __device__ DecodeState() : results{}, largest{-INFINITY, -INFINITY}, sums{} {}

  // Scores to weights, as the second operand of the product with the values; of kCount tiles.
  template <int kCount>
  __device__ __forceinline__ void weigh(const float (&scores)[kCount][4],
                                        uint32_t (&weights)[kCount][2]) {
    float next[2], shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next[i] = -INFINITY;
#pragma unroll
      for (int k = 0; k < kCount; ++k)
        next[i] = fmaxf(next[i], fmaxf(scores[k][i], scores[k][i + 2]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        next[i] = fmaxf(next[i], __shfl_xor_sync(kAllLanes, next[i], step));
      next[i] = fmaxf(next[i], largest[i]);
      shrink[i] = ptx::power_of_2(largest[i] - next[i]);
    }
    if (__any_sync(kAllLanes, next[0] != largest[0] || next[1] != largest[1])) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) results[tile][i] *= shrink[i % 2];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums[i] *= shrink[i];
      largest[i] = next[i];
      next[i] -= float(kWeightBits);
    }
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const __half2 rounded =
            __floats2half2_rn(ptx::power_of_2(scores[k][2 * half] - next[0]),
                              ptx::power_of_2(scores[k][2 * half + 1] - next[1]));
        sums[0] += __low2float(rounded);
        sums[1] += __high2float(rounded);
        weights[k][half] = ptx::transpose_matrix(ptx::as_bits(rounded));
      }
    }
  }
};

// Softmax of a block's units (warps, or teams of them) as they leave it to each other: f32 in
// shared memory, [units, kQueryColumns]; sums relative to the largest score of all.
struct UnitStatistics {
  float* largest;
  float* sums;
  uint32_t units;  // that have tiles

  __device__ __forceinline__ float largest_of(uint32_t query) const {
    float result = largest[query];
#pragma unroll 1
    for (uint32_t i = 1; i < units; ++i) result = fmaxf(result, largest[i * kQueryColumns + query]);
    return result;
  }
  __device__ __forceinline__ float sum_of(uint32_t query) const {
    float result = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < units; ++i) result += sums[i * kQueryColumns + query];
    return result;
  }
};

// A warp's results and its unit's statistics to shared memory. `speaks`: for the unit. Results of
// query q, row g or g + 8 of tile m go to results[place(q, m, row)]. With barriers of the block.
template <class State, class Place>
__device__ __forceinline__ void leave_results(State& state, const UnitStatistics& all,
                                              uint32_t unit, bool speaks, uint32_t queries,
                                              float* results, const Place& place) {
  const uint32_t lane = threadIdx.x % kLanes, group = lane / 4, query = lane % 4 * 2;
  const bool has_tiles = unit < all.units;
  speaks = speaks && group == 0;
  if (has_tiles) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        state.sums[i] += __shfl_xor_sync(kAllLanes, state.sums[i], step);
      if (speaks) all.largest[unit * kQueryColumns + query + i] = state.largest[i];
    }
  }
  __syncthreads();
  if (has_tiles) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shrink[i] = ptx::power_of_2(state.largest[i] - all.largest_of(query + i));
      if (speaks) all.sums[unit * kQueryColumns + query + i] = state.sums[i] * shrink[i];
    }
    if (query < queries) {
#pragma unroll
      for (int tile = 0; tile < State::kDimTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          results[place(query + i % 2, tile, group + i / 2 * 8)] =
              state.results[tile][i] * shrink[i % 2];
      }
    }
  }
  __syncthreads();
}

__device__ __forceinline__ void add(float4& to, float4 x) {
  to = {to.x + x.x, to.y + x.y, to.z + x.z, to.w + x.w};
}

// Merges the results of a block of `warps` warps with those of the other blocks of the row and KV
// head, `used` in all. values(q, d): sums of query q, dimensions [d, d + 4).
template <uint32_t kHeadDim, class Values>
__device__ __forceinline__ void finish_block(const AttentionKernelArgs& args,
                                             const DecodeBlock& block, uint32_t used,
                                             uint32_t warps, const UnitStatistics& all,
                                             const Values& values) {
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  constexpr uint32_t kParts = kHeadDim / kPartColumns, kQuads = kHeadDim / 4;  // of a query
  const uint32_t count = block.queries * kQuads;
  const uint32_t first_column = block.first_query * kHeadDim;
  if (used == 1) {
    for (uint32_t i = threadIdx.x; i - lane < count; i += blockDim.x) {
      float4 quad = {};
      if (i < count) {
        const float scale = 1.0f / all.sum_of(i / kQuads);
        quad = values(i / kQuads, i % kQuads * 4);
        quad = {quad.x * scale, quad.y * scale, quad.z * scale, quad.w * scale};
      }
      store_quads(args.step.output, block.row, first_column + i / kPartQuads * kPartColumns, quad,
                  i < count);
    }
    return;
  }

  const uint32_t splits = args.launch.splits;
  SplitPart* const parts =
      args.step.split_parts + uint64_t(block.index) * splits * kQueryColumns * kParts;
  for (uint32_t i = threadIdx.x; i < count; i += blockDim.x)
    ptx::store_relaxed(parts[i / kPartQuads * splits + block.split].values + i % kPartQuads * 4,
                       values(i / kQuads, i % kQuads * 4));
  // From the last thread on: it has fewer of those.
  for (uint32_t i = blockDim.x - 1 - threadIdx.x; i < block.queries * kParts; i += blockDim.x)
    ptx::store_relaxed(&parts[i * splits + block.split].largest,
                       {all.largest_of(i / kParts), all.sum_of(i / kParts), 0, 0});

  for (uint32_t part = block.split + warp * used; part < block.queries * kParts;
       part += warps * used) {
    const float4 merged = merge_parts<kMergeBatch<kHeadDim>>(parts + part * splits, used, lane);
    store_quads(args.step.output, block.row, first_column + part * kPartColumns, merged,
                lane < kPartQuads);
  }
}

}  // namespace nibble::cuda
