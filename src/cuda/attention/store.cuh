#pragma once
// Norms and RoPE of rows that share their sequence with others: a block per row writes queries to
// the workspace, keys and values to their pages, before the prefill kernel attends to them.

#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

inline constexpr int kStoreWarps = 8;

template <class Kv>
__global__ void __launch_bounds__(kStoreWarps* kLanes)
    store_kernel(const __grid_constant__ AttentionKernelArgs args) {
  __shared__ float2 turns[Kv::kHeadDim / 2];
  const AttentionLayer& layer = args.layer;
  const backend::AttentionShape& shape = layer.shape;
  const uint32_t lane = threadIdx.x % kLanes;
  const uint32_t new_row = blockIdx.x, row = args.launch.single_rows + new_row;
  ptx::launch_dependents();
  const RowPlace place = args.step.places[row];
  const uint64_t page =
      page_table(args.step, place.sequence)[place.position / backend::kKvPageTokens];
  Turns<Kv::kHeadDim, kStoreWarps * kLanes>(layer).compute(place.position, turns);
  __syncthreads();
  ptx::wait_for_dependencies();

  const QueryTiles tiles(shape);
  const uint32_t heads = shape.query_heads + 2 * shape.kv_heads;
  for (uint32_t i = threadIdx.x / kLanes; i < heads; i += kStoreWarps) {
    uint32_t index = i;
    HeadKind kind = HeadKind::kQuery;
    if (i >= shape.query_heads) {
      kind = i < shape.query_heads + shape.kv_heads ? HeadKind::kKey : HeadKind::kValue;
      index = (i - shape.query_heads) % shape.kv_heads;
    }
    WarpHead<Kv::kHeadDim> head(layer, kind, index, lane);
    head.load(args.step, args.launch.rows, row);
    head.finish(layer, turns);
    if (kind == HeadKind::kQuery) {
      const uint32_t query = new_row % tiles.tile_tokens * tiles.ratio + index % tiles.ratio;
      __half* const tile =
          args.queries + tiles.tile(new_row / tiles.tile_tokens, index / tiles.ratio);
      head.store([&](uint32_t dim) { return tile + tiles.in_tile(query, dim); });
    } else {
      const uint64_t offset = kind == HeadKind::kKey ? layer.key_offset : layer.value_offset;
      __half* const to =
          reinterpret_cast<__half*>(page_row(page, offset, index, place.position, Kv::kRowBytes));
      head.store([&](uint32_t dim) { return to + dim; });
    }
  }
}

template <class Kv>
void launch_store(cudaStream_t stream, const AttentionKernelArgs& args) {
  launch_dependent(stream, store_kernel<Kv>, args.launch.rows - args.launch.single_rows,
                   kStoreWarps * kLanes, 0, args);
}

}  // namespace nibble::cuda
