#pragma once
// The blocks that share a row's keys hand each other their partial results, each merges a share of
// the columns and writes them as activations.
//
// A part in the workspace is its own signal: all bits are one until it is written, which no result
// of arithmetic is (a NaN comes out as 0x7fffffff), and whoever has read it makes them one again.
// So there is no fence, no counter, and one way through the L2 cache between the last block's sums
// and the merge. Blocks wait for each other: all must be resident at once, which holds for at most
// a block a multiprocessor (choose_attention), since kernels behind start when all of these have,
// kernels in front end by themselves, and other backends wait for their turn (device_turn.h).
// Splits are added in one order, whoever comes first.

#include <cmath>

#include "cuda/attention/heads.cuh"
#include "cuda/layouts/activations.cuh"
#include "cuda/ptx.cuh"

namespace nibble::cuda {

namespace ptx {

// Four words to and from the L2 cache, each whole.
__device__ __forceinline__ void store_relaxed(void* to, float4 values) {
  asm volatile("st.relaxed.gpu.global.v4.f32 [%0], {%1,%2,%3,%4};" ::"l"(to), "f"(values.x),
               "f"(values.y), "f"(values.z), "f"(values.w)
               : "memory");
}
__device__ __forceinline__ float4 load_relaxed(const void* from) {
  float4 values;
  asm volatile("ld.relaxed.gpu.global.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(values.x), "=f"(values.y), "=f"(values.z), "=f"(values.w)
               : "l"(from)
               : "memory");
  return values;
}

}  // namespace ptx

inline constexpr uint32_t kPartQuads = kPartColumns / 4;  // lanes that share a part

// By a warp. Lanes 8i to 8i + 7 hold the quads of 32 columns that begin at `column`, or do not
// store.
__device__ __forceinline__ void store_quads(const ActivationRows& to, uint32_t row, uint32_t column,
                                            float4 quad, bool stores) {
  const uint32_t lane = threadIdx.x % kLanes, eight = lane % 4;
  float values[8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int from = int(2 * eight + i);
    values[4 * i] = __shfl_sync(kAllLanes, quad.x, from, kPartQuads);
    values[4 * i + 1] = __shfl_sync(kAllLanes, quad.y, from, kPartQuads);
    values[4 * i + 2] = __shfl_sync(kAllLanes, quad.z, from, kPartQuads);
    values[4 * i + 3] = __shfl_sync(kAllLanes, quad.w, from, kPartQuads);
  }
  if (stores && lane % kPartQuads < 4) store_activations(to, row, column + 8 * eight, values);
}

__device__ __forceinline__ bool is_written(float word) {
  return __float_as_uint(word) != ~0u;
}

// Merges the parts of one query's 32 columns, those of `used` splits side by side. By one warp:
// lane 8 s + q takes quad q of the splits s, s + 4, ..., kBatch of them at a time. Lanes 0 to 7
// return the result.
template <uint32_t kBatch>
__device__ float4 merge_parts(SplitPart* parts, uint32_t used, uint32_t lane) {
  constexpr uint32_t kAtOnce = kLanes / kPartQuads;
  const uint32_t quad = lane % kPartQuads;
  float largest = -INFINITY, sum = 0;
  float4 merged = {};
  const auto add = [&](float4 values, float other_sum, float weight) {
    sum += other_sum * weight;
    merged = {merged.x + values.x * weight, merged.y + values.y * weight,
              merged.z + values.z * weight, merged.w + values.w * weight};
  };
  for (uint32_t begin = lane / kPartQuads; __any_sync(kAllLanes, begin < used);
       begin += kAtOnce * kBatch) {
    float4 values[kBatch], scale[kBatch];
    bool written;
    do {
      written = true;
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        scale[i] = {-INFINITY, 0, 0, 0};
        values[i] = {};
        const SplitPart* const part = parts + begin + i * kAtOnce;
        if (begin + i * kAtOnce >= used) continue;
        values[i] = ptx::load_relaxed(part->values + 4 * quad);
        scale[i] = ptx::load_relaxed(&part->largest);
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i)
        written &= is_written(values[i].x) && is_written(values[i].y) && is_written(values[i].z) &&
                   is_written(values[i].w) && is_written(scale[i].x) && is_written(scale[i].y);
    } while (__any_sync(kAllLanes, !written));

    const float ones = __uint_as_float(~0u);
    float next = largest;
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i) {
      next = fmaxf(next, scale[i].x);
      if (begin + i * kAtOnce >= used) continue;
      SplitPart* const part = parts + begin + i * kAtOnce;
      ptx::store_relaxed(part->values + 4 * quad, {ones, ones, ones, ones});
      if (quad == 0) ptx::store_relaxed(&part->largest, {ones, ones, ones, ones});
    }
#pragma unroll
    for (uint32_t step = kPartQuads; step < kLanes; step *= 2)
      next = fmaxf(next, __shfl_xor_sync(kAllLanes, next, step));
    const float shrink = ptx::power_of_2(largest - next);
    largest = next;
    sum *= shrink;
    merged = {merged.x * shrink, merged.y * shrink, merged.z * shrink, merged.w * shrink};
#pragma unroll
    for (uint32_t i = 0; i < kBatch; ++i)
      add(values[i], scale[i].y, ptx::power_of_2(scale[i].x - next));
  }
#pragma unroll
  for (uint32_t step = kPartQuads; step < kLanes; step *= 2) {
    const float4 other = {
        __shfl_down_sync(kAllLanes, merged.x, step), __shfl_down_sync(kAllLanes, merged.y, step),
        __shfl_down_sync(kAllLanes, merged.z, step), __shfl_down_sync(kAllLanes, merged.w, step)};
    add(other, __shfl_down_sync(kAllLanes, sum, step), 1);
  }
  const float scale = __fdividef(1, sum);
  return {merged.x * scale, merged.y * scale, merged.z * scale, merged.w * scale};
}

}  // namespace nibble::cuda
