// Results of prefill that are in the order of a row's values, and rotated, to what they stand for:
// from the workspace to activations. A warp has one head of a row at a time.

#include "cuda/attention/kv_tq4.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/layouts/activations.cuh"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kWarps = 8;

template <uint32_t kBlock, bool kRotated>
__global__ void __launch_bounds__(kWarps* kLanes)
    restore_kernel(const __grid_constant__ AttentionKernelArgs args) {
  extern __shared__ __align__(16) float staged[];  // [kWarps, staged_floats()]
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t lane = threadIdx.x % kLanes, new_row = blockIdx.x;
  const QueryTiles tiles(shape);
  float* const head_values = staged + threadIdx.x / kLanes * staged_floats(shape.head_dim);
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  for (uint32_t head = threadIdx.x / kLanes; head < shape.query_heads; head += kWarps) {
    const __half* const tile =
        args.queries + tiles.tile(new_row / tiles.tile_tokens, head / tiles.ratio);
    const uint32_t query = new_row % tiles.tile_tokens * tiles.ratio + head % tiles.ratio;
    const uint32_t first = lane * kLaneValues;
    float x[kLaneValues] = {};
    if (first < shape.head_dim) {
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; i += 8) {
        const uint4 eight =
            *reinterpret_cast<const uint4*>(tile + QueryTiles::in_tile(query, first + i));
        const uint32_t words[4] = {eight.x, eight.y, eight.z, eight.w};
#pragma unroll
        for (uint32_t j = 0; j < 4; ++j) {
          const float2 pair = __half22float2(ptx::as_half2(words[j]));
          x[i + 2 * j] = pair.x, x[i + 2 * j + 1] = pair.y;
        }
      }
    }
    if constexpr (kRotated) CodecTq4::rotate_back<kBlock>(x, lane);
    if (first < shape.head_dim) {
      float4* const to = reinterpret_cast<float4*>(
          head_values + staged_place(value_dim(args.layer.kv.order, first)));
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues / 4; ++i)
        to[i] = {x[4 * i], x[4 * i + 1], x[4 * i + 2], x[4 * i + 3]};
    }
    __syncwarp();
    for (uint32_t dim = lane * 8; dim < shape.head_dim; dim += kLanes * 8) {
      float eight[8];
#pragma unroll
      for (uint32_t i = 0; i < 8; ++i) eight[i] = head_values[staged_place(dim) + i];
      store_activations(args.step.output, args.launch.single_rows + new_row,
                        head * shape.head_dim + dim, eight);
    }
    __syncwarp();
  }
}

}  // namespace

void launch_restore(cudaStream_t stream, const AttentionKernelArgs& args) {
  const KvRows& kv = args.layer.kv;
  const auto kernel = kv.format != backend::KvFormat::kTq4 ? restore_kernel<32, false>
                      : kv.block == 128                    ? restore_kernel<128, true>
                      : kv.block == 64                     ? restore_kernel<64, true>
                                                           : restore_kernel<32, true>;
  launch_dependent(stream, kernel, args.launch.rows - args.launch.single_rows, kWarps * kLanes,
                   kWarps * staged_floats(args.layer.shape.head_dim) * 4, args);
}

}  // namespace nibble::cuda
