#pragma once
// The kernel of few_rows.h. One block a multiprocessor; every warp streams its own contiguous share
// of tiles through a ring of kStages tiles in shared memory, filled by the copy engine, so that
// (warps x stages) tiles are in flight at any time, whatever the arithmetic does. A warp turns a
// tile into f16 fragments and multiplies them by up to 8 activation rows on the tensor cores, which
// cost the same for 1 row as for 8. The first tiles are asked for before the wait for the kernel in
// front: weights depend on nothing.

#include <type_traits>

#include "cuda/linear/few_rows.h"
#include "cuda/linear/fragments.cuh"

namespace nibble::cuda {

// A warp's own ring of tiles in shared memory.
template <class Layout, int kStages>
class TileRing {
 public:
  // `barriers` [kStages], both in shared memory.
  __device__ __forceinline__ TileRing(Layout* slots, uint64_t* barriers, uint32_t lane)
      : slots_(slots), barriers_(barriers), lane_(lane) {
#if __CUDA_ARCH__ >= 900
    policy_ = ptx::evict_first_policy();
    if (lane == 0) {
      for (int i = 0; i < kStages; ++i) ptx::barrier_init(&barriers[i], 1);
      ptx::barrier_init_fence();
    }
    __syncwarp();
#endif
  }

  // Asks for a tile; null keeps the count of asked-for tiles right at the end.
  __device__ __forceinline__ void ask(uint32_t slot, const Layout* tile) {
#if __CUDA_ARCH__ >= 900
    if (tile && lane_ == 0) {
      ptx::barrier_expect(&barriers_[slot], sizeof(Layout));
      ptx::bulk_copy(&slots_[slot], tile, sizeof(Layout), &barriers_[slot], policy_);
    }
#else
    if (tile) {
      const uint4* from = reinterpret_cast<const uint4*>(tile);
      uint4* to = reinterpret_cast<uint4*>(&slots_[slot]);
      for (uint32_t i = lane_; i < sizeof(Layout) / 16; i += kLanes)
        ptx::copy_async_16(to + i, from + i);
    }
    ptx::copy_async_commit();
#endif
  }

  // The oldest tile asked for and not yet taken; `round` counts how often the slot was used before.
  __device__ __forceinline__ const Layout& wait(uint32_t slot, uint32_t round) {
#if __CUDA_ARCH__ >= 900
    ptx::barrier_wait(&barriers_[slot], round & 1);
#else
    ptx::copy_async_wait<kStages - 1>();
    __syncwarp();
#endif
    return slots_[slot];
  }

 private:
  Layout* slots_;
  uint64_t* barriers_;
  uint32_t lane_;
#if __CUDA_ARCH__ >= 900
  uint64_t policy_;
#endif
};

// A row tile's sums, as far as one warp has them.
struct PartialTile {
  uint32_t row_tile;
  float sums[kMostRows][kTileRows];
};
inline constexpr uint32_t kNoTile = UINT32_MAX;

// Dynamic shared memory, in this order.
struct FewRowsShared {
  uint32_t activations, means, partials, barriers, bytes;  // offsets; the ring is at 0

  __host__ __device__ FewRowsShared(uint32_t ring_bytes, uint32_t warps, uint32_t stages,
                                    uint32_t column_tiles, uint32_t rows)
      : activations(ring_bytes),
        means(activations + column_tiles * rows * kTileColumns * 2),
        partials(means + column_tiles * rows * uint32_t(sizeof(ActivationMeans))),
        barriers((partials + warps * 2 * uint32_t(sizeof(PartialTile)) + 7) / 8 * 8),
        bytes(barriers + (warps * stages + 1) * 8) {}
};

// Brings all activations to shared memory, after the kernel in front has written them.
__device__ inline void load_activations(const FewRowsArgs& args, char* shared,
                                        const FewRowsShared& at, uint64_t* barrier) {
  const uint32_t value_bytes = args.column_tiles * args.rows * kTileColumns * 2;
  const uint32_t mean_bytes = args.column_tiles * args.rows * sizeof(ActivationMeans);
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    ptx::wait_for_dependencies();
    ptx::barrier_expect(barrier, value_bytes + mean_bytes);
    ptx::bulk_copy(shared + at.activations, args.activations, value_bytes, barrier);
    ptx::bulk_copy(shared + at.means, args.means, mean_bytes, barrier);
  }
  ptx::barrier_wait(barrier, 0);
#else
  for (uint32_t i = threadIdx.x * 16; i < value_bytes; i += blockDim.x * 16)
    *reinterpret_cast<uint4*>(shared + at.activations + i) =
        *reinterpret_cast<const uint4*>(static_cast<const char*>(args.activations) + i);
  for (uint32_t i = threadIdx.x * 16; i < mean_bytes; i += blockDim.x * 16)
    *reinterpret_cast<uint4*>(shared + at.means + i) =
        *reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(args.means) + i);
  __syncthreads();
#endif
}

// One output of both parts; `part` gets the value and the other one zero.
__device__ __forceinline__ void store_output(const FewRowsArgs& args, const PackedRows& weights,
                                             uint32_t row_tile, uint32_t tile_row, uint32_t row,
                                             float value, bool whole, uint32_t part) {
  const uint32_t weight_row = row_tile * kTileRows + tile_row;
  if (weight_row >= weights.rows || row >= args.rows) return;
  float* output = args.output + uint64_t(row) * args.output_stride + weights.first_output +
                  weight_row;
  const uint64_t second = uint64_t(args.rows) * args.output_stride;
  if (whole) {
    output[0] = value;
    output[second] = 0;
  } else {
    output[part * second] = value;
  }
}

// Adds up what the block's warps have of the row tiles that they share, in the order of the tiles'
// columns, and stores it.
__device__ inline void combine_partials(const FewRowsArgs& args, const PackedRows& weights,
                                        const PartialTile* partials, uint32_t count,
                                        bool starts_within, uint32_t first_tile, bool ends_within,
                                        uint32_t last_tile) {
  const uint32_t outputs = kTileRows * args.rows;
  for (uint32_t i = threadIdx.x; i < count * outputs; i += blockDim.x) {
    const uint32_t entry = i / outputs, tile_row = i % kTileRows, row = i % outputs / kTileRows;
    const uint32_t row_tile = partials[entry].row_tile;
    if (row_tile == kNoTile) continue;
    uint32_t before = entry;  // only the first entry of a tile's run goes on
    while (before > 0 && partials[before - 1].row_tile == kNoTile) --before;
    if (before > 0 && partials[before - 1].row_tile == row_tile) continue;
    float sum = 0;
    for (uint32_t e = entry; e < count; ++e) {
      if (partials[e].row_tile == kNoTile) continue;
      if (partials[e].row_tile != row_tile) break;
      sum += partials[e].sums[row][tile_row];
    }
    const bool has_start = !(starts_within && row_tile == first_tile);
    const bool has_end = !(ends_within && row_tile == last_tile);
    store_output(args, weights, row_tile, tile_row, row, sum, has_start && has_end,
                 has_start ? 0 : 1);
  }
}

// The share of block `block` of `blocks`.
template <class Layout, int kWarps, int kStages>
__device__ __forceinline__ void few_rows_block(const FewRowsArgs& args, const PackedRows& weights,
                                               uint32_t block, uint32_t blocks) {
  extern __shared__ __align__(128) char shared[];
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const FewRowsShared at(kWarps * kStages * sizeof(Layout), kWarps, kStages, args.column_tiles,
                         args.rows);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + at.barriers);
  PartialTile* const partials = reinterpret_cast<PartialTile*>(shared + at.partials);

  const uint32_t column_tiles = args.column_tiles;
  const uint64_t tiles = uint64_t((weights.rows + kTileRows - 1) / kTileRows) * column_tiles;
  const uint32_t block_begin = uint32_t(tiles * block / blocks);
  const uint32_t block_end = uint32_t(tiles * (block + 1) / blocks);
  const uint32_t share = block_end - block_begin;
  const uint32_t begin = block_begin + share * warp / kWarps;
  const uint32_t end = block_begin + share * (warp + 1) / kWarps;
  const Layout* const source = static_cast<const Layout*>(weights.tiles);

  TileRing<Layout, kStages> ring(reinterpret_cast<Layout*>(shared) + warp * kStages,
                                 barriers + warp * kStages, lane);
#pragma unroll
  for (int i = 0; i < kStages; ++i) ring.ask(i, begin + i < end ? source + begin + i : nullptr);
  ptx::launch_dependents();

  uint64_t* const activation_barrier = barriers + kWarps * kStages;
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    ptx::barrier_init(activation_barrier, 1);
    ptx::barrier_init_fence();
  }
#endif
  if (lane < 2) partials[2 * warp + lane].row_tile = kNoTile;
  __syncthreads();
  load_activations(args, shared, at, activation_barrier);

  const uint32_t row = lane / 4 < args.rows ? lane / 4 : 0;  // surplus columns repeat the first
  const uint4* const lane_values =
      reinterpret_cast<const uint4*>(shared + at.activations) + row * (kTileColumns / 8) + lane % 4;
  const uint2* const lane_means =
      reinterpret_cast<const uint2*>(shared + at.means) + row * 4 + lane % 4;
  const int odd = row & 1;

  float sums[4] = {};
  uint32_t row_tile = begin / column_tiles, column_tile = begin % column_tiles;
  bool from_start = column_tile == 0;
  uint32_t slot = 0, round = 0;
  for (uint32_t tile = begin; tile < end; ++tile) {
    Fragment<Layout> fragment;
    fragment.load(ring.wait(slot, round), lane);
    __syncwarp();  // all lanes have read the slot
    ring.ask(slot, tile + kStages < end ? source + tile + kStages : nullptr);
    if (++slot == kStages) slot = 0, ++round;

    const uint32_t skip = column_tile * args.rows;
    const uint4* const values = lane_values + skip * (kTileColumns / 8);
    const ActivationLane activations{values + 4 * odd, values - 4 * odd, lane_means[skip * 4]};
    fragment.multiply(activations, sums);

    const bool at_end = ++column_tile == column_tiles;
    if (!at_end && tile + 1 != end) continue;
    // Lane 4 g + t has rows g and g + 8 of activation rows 2t and 2t + 1.
    const bool whole = at_end && from_start;
    PartialTile& partial = partials[2 * warp + from_start];  // a warp's first tile, or its last
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t tile_row = lane / 4 + i / 2 * 8, output_row = lane % 4 * 2 + i % 2;
      if (whole) {
        store_output(args, weights, row_tile, tile_row, output_row, sums[i], true, 0);
      } else if (output_row < args.rows) {
        partial.sums[output_row][tile_row] = sums[i];
      }
      sums[i] = 0;
    }
    if (!whole && lane == 0) partial.row_tile = row_tile;
    ++row_tile;
    column_tile = 0;
    from_start = true;
  }
  __syncthreads();
  combine_partials(args, weights, partials, 2 * kWarps, block_begin % column_tiles != 0,
                   block_begin / column_tiles, block_end % column_tiles != 0,
                   (block_end - 1) / column_tiles);
}

struct NoLayout {};

template <class First, class Second, int kWarps, int kStages>
__global__ void __launch_bounds__(kWarps* kLanes, 1) few_rows_kernel(FewRowsArgs args) {
  if constexpr (!std::is_same_v<Second, NoLayout>) {
    if (blockIdx.x >= args.first_layout_blocks) {
      few_rows_block<Second, kWarps, kStages>(args, args.weights[1],
                                              blockIdx.x - args.first_layout_blocks,
                                              gridDim.x - args.first_layout_blocks);
      return;
    }
  }
  few_rows_block<First, kWarps, kStages>(args, args.weights[0], blockIdx.x,
                                         args.first_layout_blocks);
}

}  // namespace nibble::cuda
