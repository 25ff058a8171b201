// The partial results of single rows, merged and written as activations. A block has 128 columns of
// one row; its warps share the splits, a lane has 4 columns. Nothing is read before the decode
// kernel is done but positions, which no kernel of the step writes.

#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/layouts/activations.cuh"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kMergeWarps = 4;
constexpr uint32_t kMergeColumns = 4 * kLanes;
constexpr uint32_t kMergeBatch = 9;  // splits that a warp reads at a time

// Sums of weighted values whose weights are relative to the largest score so far.
struct Partial {
  float largest = -INFINITY, sum = 0;
  float4 values = {};

  // At least one of `others` or this has a finite largest score.
  template <uint32_t kCount>
  __device__ void add(const Partial (&others)[kCount]) {
    float next = largest;
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) next = fmaxf(next, others[i].largest);
    const float shrink = exp2f(largest - next);
    largest = next;
    sum *= shrink;
    values = {values.x * shrink, values.y * shrink, values.z * shrink, values.w * shrink};
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      const Partial& other = others[i];
      const float weight = exp2f(other.largest - next);
      sum += other.sum * weight;
      values = {values.x + other.values.x * weight, values.y + other.values.y * weight,
                values.z + other.values.z * weight, values.w + other.values.w * weight};
    }
  }
};

__global__ void __launch_bounds__(kMergeWarps* kLanes)
    merge_kernel(const __grid_constant__ AttentionKernelArgs args) {
  __shared__ Partial partials[kMergeWarps][kLanes];
  __shared__ __align__(16) float merged[kMergeColumns];
  ptx::launch_dependents();
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t width = shape.query_heads * shape.head_dim;
  const uint32_t blocks_per_row = (width + kMergeColumns - 1) / kMergeColumns;
  const uint32_t row = blockIdx.x / blocks_per_row;
  const uint32_t first_column = blockIdx.x % blocks_per_row * kMergeColumns;
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t column = first_column + 4 * lane;
  const uint32_t splits = args.launch.splits;
  const uint32_t used =
      VisibleKeys(args.step.places[row].position, args.layer.window).used_splits(splits);
  ptx::wait_for_dependencies();

  Partial mine;
  if (column < width) {
    const uint64_t first = (uint64_t(row) * shape.query_heads + column / shape.head_dim) * splits;
    const float* const values = args.partials + column % shape.head_dim;
    for (uint32_t begin = warp; begin < used; begin += kMergeWarps * kMergeBatch) {
      Partial others[kMergeBatch];
#pragma unroll
      for (uint32_t i = 0; i < kMergeBatch; ++i) {
        const uint32_t split = begin + i * kMergeWarps;
        if (split >= used) continue;
        const float2 statistics = args.statistics[first + split];
        others[i].largest = statistics.x;
        others[i].sum = statistics.y;
        others[i].values =
            *reinterpret_cast<const float4*>(values + (first + split) * shape.head_dim);
      }
      mine.add(others);
    }
  }
  partials[warp][lane] = mine;
  __syncthreads();
  if (warp != 0) return;
  Partial others[kMergeWarps - 1];
#pragma unroll
  for (uint32_t w = 1; w < kMergeWarps; ++w) others[w - 1] = partials[w][lane];
  mine.add(others);
  const float scale = 1.0f / mine.sum;
  *reinterpret_cast<float4*>(merged + 4 * lane) = {mine.values.x * scale, mine.values.y * scale,
                                                   mine.values.z * scale, mine.values.w * scale};
  __syncwarp();
  if (lane >= kMergeColumns / 8 || first_column + 8 * lane >= width) return;
  float values[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = merged[8 * lane + i];
  store_activations(args.step.output, row, first_column + 8 * lane, values);
}

}  // namespace

void launch_merge(cudaStream_t stream, const AttentionKernelArgs& args) {
  const uint32_t width = args.layer.shape.query_width();
  const uint32_t blocks_per_row = (width + kMergeColumns - 1) / kMergeColumns;
  launch_dependent(stream, merge_kernel, args.launch.single_rows * blocks_per_row,
                   kMergeWarps * kLanes, 0, args);
}

}  // namespace nibble::cuda
