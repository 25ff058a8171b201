#pragma once
// The kernel of few_rows.h. One block a multiprocessor; every warp streams its own contiguous share
// of tiles through a ring of kStages tiles in shared memory, filled by the copy engine, so that
// (warps x stages) tiles are in flight at any time, whatever the arithmetic does. A warp turns a
// tile into f16 fragments and multiplies them by the activation rows on the tensor cores, 8 at a
// time, which cost the same for 1 row as for 8. The first tiles are asked for before the wait for
// the kernel in front: weights depend on nothing.

#include <algorithm>
#include <type_traits>

#include "cuda/linear/fragments.cuh"
#include "cuda/linear/launch_few_rows.h"
#include "cuda/runtime.h"

namespace nibble::cuda {

// A warp's own ring in shared memory, of weights that are packed: a slot has kRowTiles tiles, one
// above the other.
template <class Layout, int kStages, int kRowTiles>
class TileRing {
 public:
  static constexpr uint32_t kSlots = kStages;
  static constexpr uint32_t kBytes = kStages * kRowTiles * sizeof(Layout);

  // `memory` [kBytes] and `barriers` [kStages] in shared memory.
  __device__ __forceinline__ TileRing(const WeightRows& weights, uint32_t column_tiles,
                                      char* memory, uint64_t* barriers, uint32_t lane)
      : tiles_(static_cast<const Layout*>(weights.data)),
        column_tiles_(column_tiles),
        slots_(reinterpret_cast<Layout*>(memory)),
        barriers_(barriers),
        lane_(lane) {
#if __CUDA_ARCH__ >= 900
    policy_ = ptx::evict_first_policy();
    if (lane == 0) {
      for (int i = 0; i < kStages; ++i) ptx::barrier_init(&barriers[i], 1);
      ptx::barrier_init_fence();
    }
    __syncwarp();
#endif
  }

  // Asks for `count` tiles, the one named and those below it; 0 keeps the count of asked-for slots
  // right at the end.
  __device__ __forceinline__ void ask(uint32_t slot, uint32_t count, uint32_t row_tile,
                                      uint32_t column_tile) {
    const Layout* const from = tile(row_tile, column_tile);
#if __CUDA_ARCH__ >= 900
    if (count > 0 && lane_ == 0) {
      ptx::barrier_expect(&barriers_[slot], count * uint32_t(sizeof(Layout)));
#pragma unroll
      for (uint32_t i = 0; i < kRowTiles; ++i) {
        if (i < count) {
          ptx::bulk_copy(&slots_[slot * kRowTiles + i], from + i * column_tiles_, sizeof(Layout),
                         &barriers_[slot], policy_);
        }
      }
    }
#else
    for (uint32_t i = 0; i < count; ++i) {
      const uint4* words = reinterpret_cast<const uint4*>(from + i * column_tiles_);
      uint4* to = reinterpret_cast<uint4*>(&slots_[slot * kRowTiles + i]);
      for (uint32_t j = lane_; j < sizeof(Layout) / 16; j += kLanes)
        ptx::copy_async_16(to + j, words + j);
    }
    ptx::copy_async_commit();
#endif
  }

  // Asks the L2 cache for `count` tiles side by side.
  __device__ __forceinline__ void prefetch(uint32_t row_tile, uint32_t column_tile,
                                           uint32_t count) const {
    if (lane_ == 0) ptx::prefetch(tile(row_tile, column_tile), count * uint32_t(sizeof(Layout)));
  }

  // For the oldest slot asked for and not yet taken; `round` counts how often it was used before.
  __device__ __forceinline__ void wait(uint32_t slot, uint32_t round) {
#if __CUDA_ARCH__ >= 900
    ptx::barrier_wait(&barriers_[slot], round & 1);
#else
    ptx::copy_async_wait<kStages - 1>();
    __syncwarp();
#endif
  }

  // The tiles waited for.
  __device__ __forceinline__ const Layout* take(uint32_t slot, uint32_t /*row_tile*/,
                                                uint32_t /*column_tile*/) const {
    return slots_ + slot * kRowTiles;
  }

  // All lanes have read the slot they waited for: it may be asked into again.
  __device__ __forceinline__ void release() {
#if __CUDA_ARCH__ >= 900
    ptx::finish_shared_reads();
#endif
    __syncwarp();
  }

 private:
  __device__ __forceinline__ const Layout* tile(uint32_t row_tile, uint32_t column_tile) const {
    return tiles_ + uint64_t(row_tile) * column_tiles_ + column_tile;
  }

  const Layout* tiles_;
  uint32_t column_tiles_;
  Layout* slots_;
  uint64_t* barriers_;
  uint32_t lane_;
#if __CUDA_ARCH__ >= 900
  uint64_t policy_;
#endif
};

// The same of weights as the file has them: a slot holds what the blocks of 16 rows have of a tile,
// and the warp packs it when its turn comes, into a tile that takes the place of one slot. What
// follows can't tell the difference: the same bits meet the same activations in the same order.
template <class Layout, int kStages, int kRowTiles>
class BlockRing {
  static_assert(kRowTiles == 1);
  using Block = typename Layout::Block;
  static constexpr uint32_t kPieceBytes = sizeof(Layout) / kTileRows;  // of a row
  static constexpr uint32_t kChunks = block_piece_bytes<Layout>() / 16;

 public:
  static constexpr uint32_t kSlots = kStages - 1;
  static constexpr uint32_t kBytes = ring_bytes<Layout>(kStages, backend::WeightStorage::kDirect);

  __device__ __forceinline__ BlockRing(const WeightRows& weights, uint32_t /*column_tiles*/,
                                       char* memory, uint64_t* /*barriers*/, uint32_t lane)
      : weights_(weights),
        tile_(*reinterpret_cast<Layout*>(memory)),
        slots_(memory + sizeof(Layout)),
        lane_(lane) {}

  __device__ __forceinline__ void ask(uint32_t slot, uint32_t count, uint32_t row_tile,
                                      uint32_t column_tile) {
    char* const to = slots_ + slot * (kTileRows * kChunks * 16);
    for (uint32_t i = lane_; count > 0 && i < kTileRows * kChunks; i += kLanes) {
      const Piece piece = piece_of(row_tile * kTileRows + i / kChunks, column_tile);
      const uint32_t at = i % kChunks * 16;
      if (piece.bytes > 0 && at < piece.skew + piece.bytes)
        ptx::copy_async_16(to + 16 * i, piece.begin - piece.skew + at);
    }
    ptx::copy_async_commit();
  }

  __device__ __forceinline__ void prefetch(uint32_t, uint32_t, uint32_t) const {}

  __device__ __forceinline__ void wait(uint32_t /*slot*/, uint32_t /*round*/) {
    ptx::copy_async_wait<kSlots - 1>();
    __syncwarp();
  }

  __device__ __forceinline__ const Layout* take(uint32_t slot, uint32_t row_tile,
                                                uint32_t column_tile) {
    const char* const from = slots_ + slot * (kTileRows * kChunks * 16);
    const Block* rows[2];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      const uint32_t row = lane_ / 4 + 8 * half;
      const Piece piece = piece_of(row_tile * kTileRows + row, column_tile);
      rows[half] = piece.bytes == 0
                       ? nullptr
                       : reinterpret_cast<const Block*>(from + row * (kChunks * 16) + piece.skew);
    }
    const uint32_t bytes = piece_of(row_tile * kTileRows, column_tile).bytes;
    tile_.pack_lane(lane_, rows, bytes / uint32_t(sizeof(Block)) * Block::kValues);
    __syncwarp();
    return &tile_;
  }

  __device__ __forceinline__ void release() {
    __syncwarp();
  }

 private:
  // What a row has of a tile of columns. Copies are of 16 bytes at a multiple of 16: they begin
  // `skew` bytes before it.
  struct Piece {
    const char* begin;
    uint32_t skew, bytes;
  };
  __device__ __forceinline__ Piece piece_of(uint32_t row, uint32_t column_tile) const {
    const uint32_t before = column_tile * kPieceBytes;
    const char* const begin =
        static_cast<const char*>(weights_.data) + row * weights_.row_bytes + before;
    return {begin, uint32_t(reinterpret_cast<uintptr_t>(begin) % 16),
            row < weights_.rows ? min(uint32_t(weights_.row_bytes) - before, kPieceBytes) : 0};
  }

  const WeightRows& weights_;
  Layout& tile_;
  char* const slots_;
  const uint32_t lane_;
};

// Dynamic shared memory, in this order: the ring, activations, means, partial sums, barriers.
struct FewRowsShared {
  uint32_t activations, means, partials, barriers;  // offsets

  // sums: float4 of each lane
  __device__ __forceinline__ FewRowsShared(uint32_t ring_bytes, uint32_t sums,
                                           uint32_t column_tiles, uint32_t stride)
      : activations(ring_bytes),
        means(activations + column_tiles * stride * kTileColumns * 2),
        partials(means + column_tiles * stride * uint32_t(sizeof(ActivationMeans))),
        barriers(partials + sums * kLanes * uint32_t(sizeof(float4))) {}
};

// The even share `index` of `shares` of [0, count).
struct Share {
  uint32_t begin, end;

  __device__ __forceinline__ Share(uint32_t count, uint32_t index, uint32_t shares) {
    const uint32_t each = count / shares, rest = count % shares;
    begin = each * index + min(index, rest);
    end = begin + each + (index < rest);
  }
  __device__ __forceinline__ uint32_t count() const { return end - begin; }
};

// Brings the activations of the block's columns to shared memory, after the kernel in front has
// written them.
__device__ inline void load_activations(const FewRowsArgs& args, Share columns, char* shared,
                                        const FewRowsShared& at, uint64_t* barrier) {
  const uint32_t value_tile = activation_stride(args.rows) * kTileColumns * 2;
  const uint32_t mean_tile = activation_stride(args.rows) * sizeof(ActivationMeans);
  const char* values = static_cast<const char*>(args.activations) + columns.begin * value_tile;
  const char* means = reinterpret_cast<const char*>(args.means) + columns.begin * mean_tile;
  const uint32_t value_bytes = columns.count() * value_tile;
  const uint32_t mean_bytes = columns.count() * mean_tile;
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    ptx::wait_for_dependencies();
    ptx::barrier_expect(barrier, value_bytes + mean_bytes);
    ptx::bulk_copy(shared + at.activations, values, value_bytes, barrier);
    ptx::bulk_copy(shared + at.means, means, mean_bytes, barrier);
  }
  ptx::barrier_wait(barrier, 0);
#else
  for (uint32_t i = threadIdx.x * 16; i < value_bytes; i += blockDim.x * 16)
    *reinterpret_cast<uint4*>(shared + at.activations + i) =
        *reinterpret_cast<const uint4*>(values + i);
  for (uint32_t i = threadIdx.x * 16; i < mean_bytes; i += blockDim.x * 16)
    *reinterpret_cast<uint4*>(shared + at.means + i) = *reinterpret_cast<const uint4*>(means + i);
  __syncthreads();
#endif
}

// Which of a chunk's two parts of the result a sum belongs to. kWhole is the first, with zero for
// the second; kOnly is the only one.
enum class Part { kFirst, kSecond, kWhole, kOnly };

// Stores a lane's sums: of rows g and g + 8 of the tile, for activation rows 2t and 2t + 1 of a
// token tile.
__device__ __forceinline__ void store_sums(const FewRowsArgs& args, const WeightRows& weights,
                                           uint32_t chunk, uint32_t row_tile, uint32_t token_tile,
                                           uint32_t lane, float4 sums, Part part) {
  const uint32_t weight_row = row_tile * kTileRows + lane / 4;
  const uint32_t row = token_tile * kMatrixTokens + lane % 4 * 2;
  const uint64_t second = uint64_t(args.rows) * args.output_stride;
  const uint32_t index = part == Part::kOnly ? chunk : 2 * chunk + (part == Part::kSecond);
  float* const output = args.output + index * second + uint64_t(row) * args.output_stride +
                        weights.first_output + weight_row;
  const float values[2][2] = {{sums.x, sums.y}, {sums.z, sums.w}};
#pragma unroll
  for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      if (weight_row + 8 * half >= weights.rows || row + i >= args.rows) continue;
      float* const to = output + i * uint64_t(args.output_stride) + 8 * half;
      *to = values[half][i];
      if (part == Part::kWhole) to[second] = 0;
    }
  }
}

__device__ __forceinline__ float4 add(float4 a, float4 b) {
  return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// What a warp adds up at a time.
template <int kRowTiles, int kTokenTiles>
struct WarpSums {
  float sums[kRowTiles][kTokenTiles][4] = {};

  template <class Body>
  __device__ __forceinline__ static void for_each(const Body& body) {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokenTiles; ++j) body(i, j);
    }
  }
  __device__ __forceinline__ float4 of(int i, int j) const {
    return {sums[i][j][0], sums[i][j][1], sums[i][j][2], sums[i][j][3]};
  }
};

// The share of block `block` of `blocks`.
template <class Ring, class Layout, int kWarps, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void few_rows_block(const FewRowsArgs& args, const WeightRows& weights,
                                               const FewRowsLaunch& launch, uint32_t block,
                                               uint32_t blocks) {
  extern __shared__ __align__(128) char shared[];
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;

  // Blocks [first, last) have this block's chunk of the columns and share its tiles, row by row (of
  // kRowTiles tiles, which count as one).
  const uint32_t chunks = launch.column_chunks;
  const uint32_t chunk = block * chunks / blocks;
  const uint32_t first = (chunk * blocks + chunks - 1) / chunks;
  const uint32_t last = ((chunk + 1) * blocks + chunks - 1) / chunks;
  const Share columns(args.column_tiles, chunk, chunks);
  const uint32_t column_tiles = columns.count();
  const uint32_t row_tiles = (weights.rows + kTileRows - 1) / kTileRows;
  const uint32_t tile_rows = (row_tiles + kRowTiles - 1) / kRowTiles;
  constexpr bool kOnePart = kTokenTiles > 1;
  Share mine(kOnePart ? tile_rows : tile_rows * column_tiles, block - first, last - first);
  if (kOnePart) mine.begin *= column_tiles, mine.end *= column_tiles;
  const auto warp_begin = [&](uint32_t w) {
    return mine.begin + Share(mine.count(), w, kWarps).begin;
  };
  const uint32_t begin = warp_begin(warp), end = warp_begin(warp + 1);
  uint32_t tile_row = begin / column_tiles, column_tile = begin % column_tiles;

  const uint32_t stride = activation_stride(args.rows);
  const FewRowsShared at(kWarps * Ring::kBytes, kWarps * kRowTiles * kTokenTiles,
                         (args.column_tiles + chunks - 1) / chunks, stride);
  uint64_t* const barriers = reinterpret_cast<uint64_t*>(shared + at.barriers);
  Ring ring(weights, args.column_tiles, shared + warp * Ring::kBytes,
            barriers + warp * Ring::kSlots, lane);
  uint32_t asked = begin, asked_row = tile_row * kRowTiles, asked_column = column_tile;
  const auto ask = [&](uint32_t slot) {
    const uint32_t count = kRowTiles == 1 ? 1 : min(row_tiles - asked_row, kRowTiles);
    ring.ask(slot, asked < end ? count : 0, asked_row, columns.begin + asked_column);
    ++asked;
    if (++asked_column == column_tiles) asked_column = 0, asked_row += kRowTiles;
  };
  // One stage at a time: all at once they would keep the small kernel in front of this one, whose
  // few loads wait behind them, from its data for 5 us.
  ask(0);
  ptx::launch_dependents();
#pragma unroll
  for (uint32_t i = 1; i < Ring::kSlots; ++i) {
    if (begin + i - 1 < end) ring.wait(i - 1, 0);
    ask(i);
  }
  if (asked < end && launch.prefetch_tiles > 0) {
    ring.prefetch(asked_row, columns.begin + asked_column,
                  min(end - asked, chunks == 1 ? launch.prefetch_tiles : 1));
  }

  uint64_t* const activation_barrier = barriers + kWarps * Ring::kSlots;
#if __CUDA_ARCH__ >= 900
  if (threadIdx.x == 0) {
    ptx::barrier_init(activation_barrier, 1);
    ptx::barrier_init_fence();
  }
#endif
  __syncthreads();

  // A row tile that spans warps is completed by the one that has its beginning, or the block's
  // first: those that go on with it leave their sums in `partials`. Whose, is known beforehand.
  using Sums = WarpSums<kRowTiles, kTokenTiles>;
  float4* const partials = reinterpret_cast<float4*>(shared + at.partials) + lane;
  const auto partial = [&](uint32_t w, int i, int j) -> float4& {
    return partials[((w * kRowTiles + i) * kTokenTiles + j) * kLanes];
  };
  const auto warps_before = [&](uint32_t tile) {
    uint32_t w = warp + 1;
    while (w < kWarps && warp_begin(w) < tile) ++w;
    return w;
  };
  const uint32_t first_tile_row = tile_row;
  const uint32_t first_end = warps_before((tile_row + 1) * column_tiles);
  const uint32_t last_end = warps_before((end + column_tiles - 1) / column_tiles * column_tiles);
  const bool leads = begin == mine.begin && column_tile != 0 && begin != end;

  load_activations(args, columns, shared, at, activation_barrier);
  // Surplus columns repeat the first, or are what lies there.
  const uint32_t row = lane / 4 < stride ? lane / 4 : 0;
  const uint4* const lane_values =
      reinterpret_cast<const uint4*>(shared + at.activations) + row * (kTileColumns / 8) + lane % 4;
  const uint2* const lane_means =
      reinterpret_cast<const uint2*>(shared + at.means) + row * 4 + lane % 4;
  const int odd = row & 1;

  Sums sums;
  const auto store = [&](uint32_t to, int i, int j, float4 values, Part part) {
    const uint32_t row_tile = to * kRowTiles + i;
    store_sums(args, weights, chunk, row_tile, j, lane, values, kOnePart ? Part::kOnly : part);
  };
  bool from_start = column_tile == 0;
  uint32_t slot = 0, round = 0;
  for (uint32_t tile = begin; tile < end; ++tile) {
    Fragment<Layout> fragments[kRowTiles];
    ring.wait(slot, round);
    const Layout* const tiles = ring.take(slot, tile_row, columns.begin + column_tile);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) fragments[i].load(tiles[i], lane);
    ring.release();
    ask(slot);
    if (++slot == Ring::kSlots) slot = 0, ++round;

    const uint32_t skip = column_tile * stride;
    const uint4* const values = lane_values + skip * (kTileColumns / 8);
    const ActivationLane activations{values + 4 * odd, values - 4 * odd, lane_means + skip * 4};
    multiply(fragments, activations, sums.sums);

    if (++column_tile == column_tiles) {
      Sums::for_each([&](int i, int j) {
        if (from_start) {
          store(tile_row, i, j, sums.of(i, j), Part::kWhole);
        } else {
          partial(warp, i, j) = sums.of(i, j);
        }
      });
      sums = {};
      ++tile_row;
      column_tile = 0;
      from_start = true;
    }
  }
  if (!from_start) Sums::for_each([&](int i, int j) { partial(warp, i, j) = sums.of(i, j); });
  __syncthreads();
  if (leads) {
    Sums::for_each([&](int i, int j) {
      float4 sum = partial(warp, i, j);
      for (uint32_t w = warp + 1; w < first_end; ++w) sum = add(sum, partial(w, i, j));
      store(first_tile_row, i, j, sum, Part::kSecond);
    });
  }
  if (from_start && column_tile != 0) {
    const bool has_end = (tile_row + 1) * column_tiles <= mine.end;
    Sums::for_each([&](int i, int j) {
      float4 sum = sums.of(i, j);
      for (uint32_t w = warp + 1; w < last_end; ++w) sum = add(sum, partial(w, i, j));
      store(tile_row, i, j, sum, has_end ? Part::kWhole : Part::kFirst);
    });
  }
}

template <template <class, int, int> class Ring, class First, class Second, int kWarps, int kStages,
          int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kWarps* kLanes, kWarps <= 8 && kTokenTiles == 1 ? 2 : 1)
    few_rows_kernel(const __grid_constant__ FewRowsArgs args,
                    const __grid_constant__ FewRowsLaunch launch) {
  if constexpr (!std::is_same_v<Second, NoLayout>) {
    if (blockIdx.x >= launch.first_blocks) {
      few_rows_block<Ring<Second, kStages, kRowTiles>, Second, kWarps, kRowTiles, kTokenTiles>(
          args, args.weights[1], launch, blockIdx.x - launch.first_blocks,
          gridDim.x - launch.first_blocks);
      return;
    }
  }
  few_rows_block<Ring<First, kStages, kRowTiles>, First, kWarps, kRowTiles, kTokenTiles>(
      args, args.weights[0], launch, blockIdx.x, launch.first_blocks);
}

template <template <class, int, int> class Ring, class First, class Second, bool kWide,
          int kTokenTiles>
void launch_few_rows_shape(cudaStream_t stream, const FewRowsArgs& args,
                           const FewRowsLaunch& launch) {
  constexpr RingShape kShape =
      ring_shape(std::max(sizeof(First), sizeof(Second)), kWide, kTokenTiles);
  const auto kernel = few_rows_kernel<Ring, First, Second, kShape.warps, kShape.stages,
                                      kShape.row_tiles, kTokenTiles>;
  NIBBLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(launch.shared_bytes)));
  launch_dependent(stream, kernel, launch.blocks, kShape.warps * kLanes, launch.shared_bytes, args,
                   launch);
}

template <class First, class Second>
void launch_few_rows_kernel(cudaStream_t stream, const FewRowsArgs& args,
                            const FewRowsLaunch& launch) {
  const auto start = [&]<bool kWide, int kTokenTiles>() {
    launch_few_rows_shape<TileRing, First, Second, kWide, kTokenTiles>(stream, args, launch);
  };
  const auto start_direct = [&]<bool kWide>() {
    launch_few_rows_shape<BlockRing, First, Second, kWide, 1>(stream, args, launch);
  };
  if (args.weights[0].row_bytes > 0)
    return launch.wide ? start_direct.template operator()<true>()
                       : start_direct.template operator()<false>();
  if (!launch.wide) return start.template operator()<false, 1>();
  switch (token_tiles_of(args.rows)) {
    case 1:
      return start.template operator()<true, 1>();
    case 2:
      return start.template operator()<true, 2>();
    default:
      return start.template operator()<true, 4>();
  }
}

}  // namespace nibble::cuda
