#pragma once
// The kernel of many_rows.h on Hopper's asynchronous matrix instructions.
//
// A block takes a tile of 128 or 256 weight rows by up to 128 tokens: two warpgroups of consumers,
// half of the weight rows each. Weights are the left operand, from
// registers: a lane reads its own part of a packed tile from shared memory and finishes f16 weights
// for the next instruction while the tensor cores work on the one before. Activations are the
// right operand, in shared memory as they lie in global memory. Two producer warps keep two rings
// full by bulk copies: whole weight tiles (256 columns) and blocks of activations (64 columns). A
// tall tile, because a weight has 4.5 bits and an activation 16: 25 bytes a clock come from the L2
// cache at full speed, where a tile of 128 x 256 would want 37.

#include "cuda/linear/few_rows.h"
#include "cuda/linear/many_rows.h"
#include "cuda/linear/many_rows_fragments.cuh"
#include "cuda/ptx_hopper.cuh"
#include "cuda/ring.cuh"

namespace nibble::cuda {

inline constexpr uint32_t kConsumerWarps = 8;
inline constexpr uint32_t kConsumers = kConsumerWarps * kLanes;
inline constexpr uint32_t kWarpgroup = 128;
inline constexpr uint32_t kWgmmaThreads = kConsumers + kWarpgroup;

// Dynamic shared memory: activations, weights, barriers.
template <class Layout, int kTokens, int kSharers>
struct WgmmaShape {
  static constexpr uint32_t kRows = many_rows_tile_rows(sizeof(Layout), kSharers);
  static constexpr uint32_t kMostSharedBytes = (kSharers == 1 ? 226 : 113) << 10;
  static constexpr int kProducerRegisters = kSharers == 1 ? 24 : 32;
  static constexpr int kConsumerRegisters = kSharers == 1 ? 240 : 104;
  static constexpr uint32_t kRowTiles = kRows / kTileRows;            // in a block's tile
  static constexpr uint32_t kWarpTiles = kRowTiles / kConsumerWarps;  // of them, a warp's own
  static constexpr uint32_t kActivationBytes = kTokens * kBlockColumns * 2;
  static constexpr uint32_t kWeightBytes = kRowTiles * sizeof(Layout);
  static constexpr uint32_t at_most(uint32_t value, uint32_t most) {
    return value < most ? value : most;
  }
  // Where weights are most of the bytes, as many columns of activations as of weights are on their
  // way, nearly: both take as long to come.
  static constexpr uint32_t kLeastActivationStages = at_most(
      (kMostSharedBytes - 1024 - 2 * kWeightBytes) / kActivationBytes, kTokens > 64 ? 4 : 7);
  static constexpr uint32_t kWeightStages =
      at_most((kMostSharedBytes - 1024 - kLeastActivationStages * kActivationBytes) / kWeightBytes,
              kTokens > 64 ? 3 : 5);
  static constexpr uint32_t kActivationStages =
      at_most((kMostSharedBytes - 1024 - kWeightStages * kWeightBytes) / kActivationBytes, 12);
  static constexpr uint32_t kWeightsAt = kActivationStages * kActivationBytes;
  static constexpr uint32_t kBarriersAt = kWeightsAt + kWeightStages * kWeightBytes;
  static constexpr uint32_t kSharedBytes =
      kBarriersAt + 2 * (kWeightStages + kActivationStages) * sizeof(uint64_t);
  static_assert(kWeightStages >= 2 && kActivationStages >= 4);
};

// Part of a tile's columns, in tiles of kTileColumns from its chunk's first on.
struct Segment {
  uint32_t tile, begin, end;
};

// Which of the result's rows, parts and tokens a tile is.
struct ResultPlace {
  uint32_t row_block, chunk, token_block;

  __device__ __forceinline__ ResultPlace(const ManyRowsLaunch& launch, uint32_t tile)
      : row_block(tile / launch.token_blocks / launch.column_chunks),
        chunk(tile / launch.token_blocks % launch.column_chunks),
        token_block(tile % launch.token_blocks) {}
};

// Where block `index`'s share of the tiles that blocks share begins.
__device__ __forceinline__ uint32_t share(const ManyRowsLaunch& launch, uint32_t depth,
                                          uint32_t index) {
  const uint32_t count = (launch.tiles() - launch.whole_tiles) * depth;
  const uint32_t each = count / launch.sharing_blocks, rest = count % launch.sharing_blocks;
  return each * index + min(index, rest);
}

// What a block works on, in order.
class Segments {
 public:
  __device__ __forceinline__ Segments(const ManyRowsLaunch& launch, uint32_t depth)
      : whole_(launch.whole_tiles), depth_(depth), tile_(blockIdx.x) {
    const bool shares = blockIdx.x < launch.sharing_blocks;
    at_ = shares ? share(launch, depth_, blockIdx.x) : 0;
    end_ = shares ? share(launch, depth_, blockIdx.x + 1) : 0;
  }
  __device__ __forceinline__ bool next(Segment& segment) {
    if (tile_ < whole_) {
      segment = {tile_, 0, depth_};
      tile_ += gridDim.x;
      return true;
    }
    if (at_ == end_) return false;
    const uint32_t begin = at_ % depth_;
    const uint32_t length = min(depth_ - begin, end_ - at_);
    segment = {whole_ + at_ / depth_, begin, begin + length};
    at_ += length;
    return true;
  }

 private:
  uint32_t whole_, depth_, tile_, at_, end_;
};

#if NIBBLE_HAS_WGMMA
// One tile's sums, of a thread: [weight row tile][token / 2 of its own, see ptx::wgmma].
template <class Shape, int kTokens>
using TileSums = float[Shape::kWarpTiles][kTokens / 2];

template <class Layout, int kTokens, int kSharers>
class WgmmaBlock {
  using Shape = WgmmaShape<Layout, kTokens, kSharers>;
  using Sums = TileSums<Shape, kTokens>;

 public:
  __device__ __forceinline__ WgmmaBlock(const ManyRowsArgs& args, const ManyRowsLaunch& launch,
                                        char* shared)
      : args_(args),
        launch_(launch),
        depth_(args.activations.column_tiles / launch.column_chunks),
        activations_(shared),
        weights_(reinterpret_cast<Layout*>(shared + Shape::kWeightsAt)) {
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);
    weights_full_ = barriers;
    weights_free_ = weights_full_ + Shape::kWeightStages;
    activations_full_ = weights_free_ + Shape::kWeightStages;
    activations_free_ = activations_full_ + Shape::kActivationStages;
  }

  __device__ __forceinline__ void init_barriers() {
    for (uint32_t i = 0; i < Shape::kWeightStages; ++i) {
      ptx::barrier_init(&weights_full_[i], 1);
      ptx::barrier_init(&weights_free_[i], kConsumerWarps);
    }
    for (uint32_t i = 0; i < Shape::kActivationStages; ++i) {
      ptx::barrier_init(&activations_full_[i], 1);
      ptx::barrier_init(&activations_free_[i], kConsumerWarps);
    }
    ptx::barrier_init_fence();
  }

  __device__ __forceinline__ void produce_weights(uint32_t lane) {
    const uint32_t row_tiles = (args_.weights.rows + kTileRows - 1) / kTileRows;
    const uint32_t column_tiles = args_.activations.column_tiles;
    const uint64_t policy = ptx::evict_first_policy();
    RingPlace<Shape::kWeightStages> place;
    Segments segments(launch_, depth_);
    for (Segment segment; segments.next(segment);) {
      const ResultPlace at(launch_, segment.tile);
      const uint32_t first = at.row_block * Shape::kRowTiles;
      const uint32_t count = min(Shape::kRowTiles, row_tiles - first);
      const Layout* const tiles = static_cast<const Layout*>(args_.weights.data) +
                                  uint64_t(first + lane) * column_tiles + at.chunk * depth_;
#pragma unroll 1  // within a producer's registers
      for (uint32_t column = segment.begin; column < segment.end; ++column) {
        ptx::barrier_wait(&weights_free_[place.slot], place.round ^ 1);
        uint64_t* const full = &weights_full_[place.slot];
        if (lane == 0) ptx::barrier_expect(full, count * uint32_t(sizeof(Layout)));
        __syncwarp();
        if (lane < count) {
          Layout* const slot = &weights_[place.slot * Shape::kRowTiles + lane];
          if (kSharers > 1) {
            ptx::bulk_copy(slot, tiles + column, sizeof(Layout), full, policy);
          } else {  // other blocks read it, too
            ptx::bulk_copy(slot, tiles + column, sizeof(Layout), full);
          }
        }
        place.advance();
      }
    }
  }

  __device__ __forceinline__ void produce_activations() {
    ptx::wait_for_dependencies();
    const uint64_t row_groups = args_.activations.row_groups();
    const char* const values = reinterpret_cast<const char*>(args_.activations.values);
    constexpr uint32_t kGroupBytes = 8 * kBlockColumns * 2;
    constexpr uint32_t kBlocks = kTileColumns / kBlockColumns;
    RingPlace<Shape::kActivationStages> place;
    Segments segments(launch_, depth_);
    for (Segment segment; segments.next(segment);) {
      const ResultPlace at(launch_, segment.tile);
      const uint32_t first = at.token_block * (kTokens / 8);
      const uint32_t bytes = min(uint32_t(row_groups) - first, uint32_t(kTokens / 8)) * kGroupBytes;
#pragma unroll 1
      for (uint32_t block = segment.begin * kBlocks; block < segment.end * kBlocks; ++block) {
        ptx::barrier_wait(&activations_free_[place.slot], place.round ^ 1);
        uint64_t* const full = &activations_full_[place.slot];
        ptx::barrier_expect(full, bytes);
        ptx::bulk_copy(
            activations_ + place.slot * Shape::kActivationBytes,
            values + ((at.chunk * depth_ * kBlocks + block) * row_groups + first) * kGroupBytes,
            bytes, full);
        place.advance();
      }
    }
  }

  __device__ __forceinline__ void consume() {
    Segments segments(launch_, depth_);
    for (Segment segment; segments.next(segment);) {
      Sums sums;
#pragma unroll
      for (auto& tile : sums) {
#pragma unroll
        for (float& sum : tile) sum = 0;
      }
      multiply(segment, sums);
      if (segment.begin > 0) {
        leave_sums(sums);
      } else {
        if (segment.end < depth_) add_others(segment, sums);
        store(segment.tile, sums);
      }
    }
  }

 private:
  __device__ __forceinline__ static uint32_t lane() {
    return threadIdx.x % kLanes;
  }
  __device__ __forceinline__ static uint32_t warp() {
    return threadIdx.x / kLanes;
  }
  // The warp's weight row tile `i`, within the block's tile.
  __device__ __forceinline__ static uint32_t row_tile(uint32_t i) {
    return warp() / 4 * (4 * Shape::kWarpTiles) + 4 * i + warp() % 4;
  }

  // What a warp holds of its weight tiles: scales of a tile's columns, quants of each half of them.
  using Scales = TileScales<Layout>[Shape::kWarpTiles];
  using Half = HalfTile<Layout>[Shape::kWarpTiles];
  __device__ __forceinline__ const Layout& tile(uint32_t i) const {
    return weights_[weights_place_.slot * Shape::kRowTiles + row_tile(i)];
  }
  __device__ __forceinline__ void load_scales_and_first_half(Scales& scales, Half& half) {
    ptx::barrier_wait(&weights_full_[weights_place_.slot], weights_place_.round);
#pragma unroll
    for (int i = 0; i < Shape::kWarpTiles; ++i) {
      scales[i].load(tile(i), lane());
      half[i].load(tile(i), lane(), 0);
    }
  }
  __device__ __forceinline__ void load_second_half(Half& half) {
#pragma unroll
    for (int i = 0; i < Shape::kWarpTiles; ++i) half[i].load(tile(i), lane(), 1);
    ptx::finish_shared_reads();
    __syncwarp();
    release(&weights_free_[weights_place_.slot]);
    weights_place_.advance();
  }
  __device__ __forceinline__ static void release(uint64_t* barrier) {
    if (lane() == 0) ptx::barrier_arrive(barrier);
  }

  // Weights are loaded half a tile ahead and finished one instruction ahead.
  __device__ __forceinline__ void multiply(const Segment& segment, Sums& sums) {
    constexpr int kNone = -1;
    int done = kNone;  // the activations that instructions in flight were the last to read
    __half2 left[2][Shape::kWarpTiles][4];
    Scales scales, next_scales;
    Half halves[2];
    load_scales_and_first_half(scales, halves[0]);
#pragma unroll 1
    for (uint32_t column = segment.begin; column < segment.end; ++column) {
#pragma unroll
      for (int group = 0; group < 2; ++group) {
#pragma unroll
        for (int block = 0; block < 2; ++block) {
          ptx::barrier_wait(&activations_full_[activations_place_.slot], activations_place_.round);
          const uint64_t right = ptx::matrix_descriptor(activations_ + activations_place_.slot *
                                                                           Shape::kActivationBytes);
#pragma unroll
          for (int i = 0; i < 4; ++i) {
#pragma unroll
            for (int j = 0; j < Shape::kWarpTiles; ++j) {
              halves[group][j].weights(scales[j], group, 2 * block + i / 2, i % 2, left[i % 2][j]);
            }
            ptx::wgmma_fence();
#pragma unroll
            for (int j = 0; j < Shape::kWarpTiles; ++j)
              ptx::wgmma<kTokens>(sums[j], left[i % 2][j], ptx::skip_columns(right, i));
            ptx::wgmma_commit();
            if (block == 1 && i == 0) {
              if (group == 0) load_second_half(halves[1]);
              if (group == 1 && column + 1 < segment.end)
                load_scales_and_first_half(next_scales, halves[0]);
            }
            ptx::wgmma_wait<1>();
            if (i == 0 && done != kNone) release(&activations_free_[done]);
          }
          done = int(activations_place_.slot);
          activations_place_.advance();
        }
      }
#pragma unroll
      for (int j = 0; j < Shape::kWarpTiles; ++j) scales[j] = next_scales[j];
    }
    ptx::wgmma_wait<0>();
    release(&activations_free_[done]);
  }

  // Where a block leaves the sums of a tile that another one finishes: one float4 of each thread
  // beside the other's.
  __device__ __forceinline__ float4* left_sums(uint32_t block) const {
    constexpr uint32_t kBlockFloats = Shape::kRows * kTokens;
    char* const sums = static_cast<char*>(args_.workspace) + kFlagBytes;
    return reinterpret_cast<float4*>(sums) + uint64_t(block) * (kBlockFloats / 4) + threadIdx.x;
  }
  __device__ __forceinline__ uint32_t* flag(uint32_t block) const {
    return static_cast<uint32_t*>(args_.workspace) + block;
  }

  __device__ __forceinline__ void leave_sums(const Sums& sums) {
    float4* const to = left_sums(blockIdx.x);
#pragma unroll
    for (int i = 0; i < Shape::kWarpTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float* from = &sums[i][4 * j];
        to[(i * (kTokens / 8) + j) * kConsumers] = {from[0], from[1], from[2], from[3]};
      }
    }
    ptx::sync_threads(1, kConsumers);  // what all have written, one releases
    if (threadIdx.x == 0) ptx::store_release(flag(blockIdx.x), 1);
  }

  // Adds what the next blocks leave for the tile's other columns, in their order.
  __device__ __forceinline__ void add_others(const Segment& segment, Sums& sums) {
    const uint32_t tile_end = (segment.tile - launch_.whole_tiles + 1) * depth_;
    const auto has_part = [&](uint32_t block) {
      return block < launch_.sharing_blocks && share(launch_, depth_, block) < tile_end;
    };
    for (uint32_t block = blockIdx.x + 1 + threadIdx.x; has_part(block); block += kConsumers) {
      while (ptx::load_acquire(flag(block)) == 0) {
      }
      *flag(block) = 0;  // as the next launch wants it
    }
    ptx::sync_threads(1, kConsumers);
    for (uint32_t block = blockIdx.x + 1; has_part(block); ++block) {
      const float4* const from = left_sums(block);
#pragma unroll
      for (int i = 0; i < Shape::kWarpTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float4 other = from[(i * (kTokens / 8) + j) * kConsumers];
          float* const to = &sums[i][4 * j];
          to[0] += other.x, to[1] += other.y, to[2] += other.z, to[3] += other.w;
        }
      }
    }
  }

  __device__ __forceinline__ void store(uint32_t tile, const Sums& sums) const {
    const ResultPlace at(launch_, tile);
    const uint32_t first_token = at.token_block * kTokens + lane() % 4 * 2;
    const uint32_t first_row = at.row_block * Shape::kRows + lane() / 4;
    const uint64_t first_result = uint64_t(at.chunk) * args_.activations.rows;
    float scales[kTokens / 8][2];  // all before the first store: each would wait for them anew
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t token = first_token + 8 * j + k;
        const bool scaled = args_.scales && token < args_.activations.rows;
        scales[j][k] = scaled ? args_.scales[token] : 1.0f;
      }
    }
#pragma unroll
    for (int j = 0; j < kTokens / 8; ++j) {
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const uint32_t token = first_token + 8 * j + k;
        if (token >= args_.activations.rows) continue;
        float* const output = args_.output + (first_result + token) * args_.output_stride +
                              args_.weights.first_output;
#pragma unroll
        for (int i = 0; i < Shape::kWarpTiles; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t row = first_row + row_tile(i) * kTileRows + 8 * half;
            if (row < args_.weights.rows)
              output[row] = scales[j][k] * sums[i][4 * j + 2 * half + k];
          }
        }
      }
    }
  }

  const ManyRowsArgs& args_;
  const ManyRowsLaunch& launch_;
  const uint32_t depth_;  // column tiles of a chunk
  char* const activations_;
  Layout* const weights_;
  uint64_t *weights_full_, *weights_free_, *activations_full_, *activations_free_;
  RingPlace<Shape::kWeightStages> weights_place_;
  RingPlace<Shape::kActivationStages> activations_place_;
};
#endif

template <class Layout, int kTokens, int kSharers>
__global__ void __launch_bounds__(kWgmmaThreads, kSharers)
    many_rows_wgmma(const __grid_constant__ ManyRowsArgs args,
                    const __grid_constant__ ManyRowsLaunch launch) {
#if NIBBLE_HAS_WGMMA
  extern __shared__ __align__(1024) char shared[];
  using Shape = WgmmaShape<Layout, kTokens, kSharers>;
  WgmmaBlock<Layout, kTokens, kSharers> block(args, launch, shared);
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    ptx::give_up_registers<Shape::kProducerRegisters>();
    const uint32_t warp = (threadIdx.x - kConsumers) / kLanes, lane = threadIdx.x % kLanes;
    if (warp == 0) block.produce_weights(lane);
    if (warp == 1 && lane == 0) block.produce_activations();
    ptx::launch_dependents();
  } else {
    ptx::take_registers<Shape::kConsumerRegisters>();
    ptx::launch_dependents();
    block.consume();
  }
#endif
}

}  // namespace nibble::cuda
