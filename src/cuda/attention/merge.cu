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

constexpr int kMergeWarps = 4;
constexpr uint32_t kMergeColumns = 4 * kLanes;

// Sums of weighted values whose weights are relative to the largest score so far.
struct Partial {
  float largest = -INFINITY, sum = 0;
  float4 values = {};

  __device__ void add(float other_largest, float other_sum, float4 other) {
    const float next = fmaxf(largest, other_largest);
    const float mine = exp2f(largest - next), its = exp2f(other_largest - next);
    largest = next;
    sum = sum * mine + other_sum * its;
    values = {values.x * mine + other.x * its, values.y * mine + other.y * its,
              values.z * mine + other.z * its, values.w * mine + other.w * its};
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
#pragma unroll 8
    for (uint32_t split = warp; split < used; split += kMergeWarps) {
      const float2 statistics = args.statistics[first + split];
      mine.add(statistics.x, statistics.y,
               *reinterpret_cast<const float4*>(values + (first + split) * shape.head_dim));
    }
  }
  partials[warp][lane] = mine;
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int w = 1; w < kMergeWarps; ++w) {
    const Partial& other = partials[w][lane];
    if (other.sum > 0) mine.add(other.largest, other.sum, other.values);
  }
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
