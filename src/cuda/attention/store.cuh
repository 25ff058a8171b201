#pragma once
// Norms and RoPE of rows that share their sequence with others: a warp per head writes queries to
// the workspace, keys and values to their pages, before the prefill kernel attends to them.

#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

inline constexpr int kStoreWarps = 4;

template <class Kv>
__global__ void __launch_bounds__(kStoreWarps* kLanes)
    store_kernel(const __grid_constant__ AttentionKernelArgs args) {
  const AttentionLayer& layer = args.layer;
  const uint32_t lane = threadIdx.x % kLanes;
  const uint32_t heads_per_row = layer.shape.query_heads + 2 * layer.shape.kv_heads;
  const uint32_t index = blockIdx.x * kStoreWarps + threadIdx.x / kLanes;
  const uint32_t single_rows = args.launch.single_rows;
  const uint32_t row = single_rows + index / heads_per_row;
  ptx::launch_dependents();
  if (row >= args.launch.rows) return;
  const RowHeads<Kv::kHeadDim> heads(args, row, lane);
  const RowPlace place = args.step.places[row];
  const uint64_t page =
      page_table(args.step, place.sequence)[place.position / backend::kKvPageTokens];
  ptx::wait_for_dependencies();

  const uint32_t head = index % heads_per_row;
  if (head < layer.shape.query_heads) {
    const uint64_t at = uint64_t(row - single_rows) * layer.shape.query_heads + head;
    heads.query(head).store(args.queries + at * Kv::kHeadDim, 0, lane);
    return;
  }
  const uint32_t kv_head = (head - layer.shape.query_heads) / 2;
  const bool is_key = (head - layer.shape.query_heads) % 2 == 0;
  const WarpHead<Kv::kHeadDim> stored = is_key ? heads.key(kv_head) : heads.value(kv_head);
  stored.store(page_row(page, is_key ? layer.key_offset : layer.value_offset, kv_head,
                        place.position, Kv::kRowBytes),
               0, lane);
}

template <class Kv>
void launch_store(cudaStream_t stream, const AttentionKernelArgs& args) {
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t warps =
      (args.launch.rows - args.launch.single_rows) * (shape.query_heads + 2 * shape.kv_heads);
  launch_dependent(stream, store_kernel<Kv>, (warps + kStoreWarps - 1) / kStoreWarps,
                   kStoreWarps * kLanes, 0, args);
}

}  // namespace nibble::cuda
