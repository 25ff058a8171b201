#pragma once
// Norms and RoPE of rows that share their sequence with others: a block per row writes queries to
// the workspace, keys and values to their pages, before the prefill kernel attends to them.

#include "cuda/attention/kv_row.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

inline constexpr uint32_t kStoreWarps = 8;

template <class Kv>
__global__ void __launch_bounds__(kStoreWarps* kLanes)
    store_kernel(const __grid_constant__ AttentionKernelArgs args) {
  extern __shared__ __align__(16) float staged[];  // [kStoreWarps, staged_floats()]
  __shared__ float2 turns[Kv::kHeadDim / 2];
  const AttentionLayer& layer = args.layer;
  const backend::AttentionShape& shape = layer.shape;
  const uint32_t lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const uint32_t new_row = blockIdx.x, row = args.launch.single_rows + new_row;
  ptx::launch_dependents();
  const RowPlace place = args.step.places[row];
  const uint64_t page =
      page_table(args.step, place.sequence)[place.position / backend::kKvPageTokens];
  Turns<Kv::kHeadDim>(layer).compute(place.position, turns);
  __syncthreads();
  ptx::wait_for_dependencies();

  const QueryTiles tiles(shape);
  const RowMaker<Kv> rows(layer, turns, staged + warp * staged_floats(Kv::kHeadDim), lane);
  const uint32_t heads = shape.query_heads + (layer.kv.shared ? 1 : 2) * shape.kv_heads;
  for (uint32_t i = warp; i < heads; i += kStoreWarps) {
    uint32_t index = i;
    HeadKind kind = HeadKind::kQuery;
    if (i >= shape.query_heads) {
      kind = i < shape.query_heads + shape.kv_heads ? HeadKind::kKey : HeadKind::kValue;
      index = (i - shape.query_heads) % shape.kv_heads;
    }
    WarpHead<Kv::kHeadDim, true> head(layer, kind, index, lane);
    head.load(args.step, args.launch.rows, row);
    if (kind == HeadKind::kQuery) {
      const uint32_t query = new_row % tiles.tile_tokens * tiles.ratio + index % tiles.ratio;
      __half* const tile =
          args.queries + tiles.tile(new_row / tiles.tile_tokens, index / tiles.ratio);
      rows.turn(head, true);
      rows.put_query(head, [&](uint32_t d) { return tile + QueryTiles::in_tile(query, d); });
    } else {
      const uint64_t offset = kind == HeadKind::kKey ? layer.kv.key_offset : layer.kv.value_offset;
      const KvRow to = page_row(page, layer.kv, offset, index, place.position);
      rows.turn(head, !layer.kv.shared);
      rows.put_part(head, rows.part(0), to);
      if (layer.kv.shared && rows.part_count() == 2) {
        head.weigh();
        head.rotate(turns);
        rows.put_part(head, rows.part(1), to);
      }
    }
  }
}

template <class Kv>
void launch_store(cudaStream_t stream, const AttentionKernelArgs& args) {
  const uint32_t bytes = Kv::kInBlocks ? kStoreWarps * staged_floats(Kv::kHeadDim) * 4 : 0;
  launch_dependent(stream, store_kernel<Kv>, args.launch.rows - args.launch.single_rows,
                   kStoreWarps * kLanes, bytes, args);
}

}  // namespace nibble::cuda
