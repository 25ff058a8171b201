#pragma once
// The kernel of many_rows.h on Hopper's asynchronous matrix instructions.
//
// A block takes a tile of 128 or 256 weight rows by up to 128 tokens: two warpgroups of consumers,
// half of the weight rows each. Weights are the left operand, from registers: a lane reads its own
// part of a packed tile from shared memory and finishes f16 weights for the next instruction while
// the tensor cores work on the one before. Activations are the right operand, in shared memory as
// they lie in global memory. Two producer warps keep two rings full by bulk copies: whole weight
// tiles (256 columns) and activations (128 columns); a third one looks out for what other blocks
// leave. A tall tile, because a weight has 4.5 bits and an activation 16: 25 bytes a clock come
// from the L2 cache at full speed, where a tile of 128 x 256 would want 37.

#include <type_traits>

#include "cuda/linear/launch_many_rows.h"
#include "cuda/linear/many_rows_fragments.cuh"
#include "cuda/ptx_hopper.cuh"
#include "cuda/ring.cuh"

namespace nibble::cuda {

inline constexpr uint32_t kWarpgroup = 128;

// Dynamic shared memory: activations, weights, barriers.
template <class Layout, int kTokens>
struct WgmmaShape {
  static constexpr bool kStream = kTokens <= kStreamTokens;
  static constexpr uint32_t kSharers = many_rows_sharers(sizeof(Layout), kStream);
  static constexpr uint32_t kRows = many_rows_tile_rows(sizeof(Layout), kStream);
  static constexpr uint32_t kMostSharedBytes = (kSharers == 1 ? 226 : 113) << 10;
  static constexpr uint32_t kRowTiles = kRows / kTileRows;  // in a block's tile
  static constexpr uint32_t kConsumerWarps = 8;
  static constexpr uint32_t kConsumers = kConsumerWarps * kLanes;
  static constexpr uint32_t kThreads = kConsumers + kWarpgroup;
  static constexpr int kProducerRegisters = kSharers == 1 ? 24 : 32;
  static constexpr int kConsumerRegisters = kSharers == 2 ? 104 : 240;
  static constexpr uint32_t kWarpTiles = kRowTiles / kConsumerWarps;  // of them, a warp's own
  static constexpr uint32_t kActivationBytes = kTokens * kBlockColumns * 2;
  static constexpr uint32_t kStageBlocks = 2;  // half a weight tile's columns
  static constexpr uint32_t kStageBytes = kStageBlocks * kActivationBytes;
  static constexpr uint32_t kWeightBytes = kRowTiles * sizeof(Layout);
  static constexpr uint32_t at_most(uint32_t value, uint32_t most) {
    return value < most ? value : most;
  }
  // Where weights are most of the bytes, as many columns of activations as of weights are on their
  // way, nearly: both take as long to come.
  static constexpr uint32_t kLeastActivationStages =
      at_most((kMostSharedBytes - 1024 - 2 * kWeightBytes) / kStageBytes, 3);
  static constexpr uint32_t kWeightStages =
      at_most((kMostSharedBytes - 1024 - kLeastActivationStages * kStageBytes) / kWeightBytes,
              kTokens > 64 ? 3 : 5);
  static constexpr uint32_t kActivationStages =
      at_most((kMostSharedBytes - 1024 - kWeightStages * kWeightBytes) / kStageBytes, 6);
  static constexpr uint32_t kWeightsAt = kActivationStages * kStageBytes;
  static constexpr uint32_t kBarriersAt = kWeightsAt + kWeightStages * kWeightBytes;
  static constexpr uint32_t kSharedBytes =
      kBarriersAt + (2 * (kWeightStages + kActivationStages) + 1) * sizeof(uint64_t);
  static_assert(kWeightStages >= 2 && kActivationStages >= 2);
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

// This block, among those of its launch.
__device__ __forceinline__ uint32_t block_of(const ManyRowsLaunch& launch) {
  return blockIdx.x - launch.first_block;
}

// What a block works on, in order.
class Segments {
 public:
  __device__ __forceinline__ explicit Segments(const ManyRowsLaunch& launch)
      : launch_(launch), tile_(block_of(launch)), left_(0) {
    const uint32_t block = block_of(launch);
    if (block >= launch.sharing_blocks) return;
    const uint32_t begin = launch.share_begin(block);
    left_ = launch.share_begin(block + 1) - begin;
    shared_tile_ = launch.whole_tiles + begin / launch.depth;
    begin_ = begin % launch.depth;
  }
  __device__ __forceinline__ bool next(Segment& segment) {
    if (tile_ < launch_.whole_tiles) {
      segment = {tile_, 0, launch_.depth};
      tile_ += launch_.blocks;
      return true;
    }
    if (left_ == 0) return false;
    const uint32_t length = min(launch_.depth - begin_, left_);
    segment = {shared_tile_++, begin_, begin_ + length};
    begin_ = 0;
    left_ -= length;
    return true;
  }

 private:
  const ManyRowsLaunch& launch_;
  uint32_t tile_, shared_tile_, begin_, left_;
};

#if NIBBLE_HAS_WGMMA
// One tile's sums, of a thread: [weight row tile][token / 2 of its own, see ptx::wgmma].
template <class Shape, int kTokens>
using TileSums = float[Shape::kWarpTiles][kTokens / 2];

template <class Layout, int kTokens>
class WgmmaBlock {
  using Shape = WgmmaShape<Layout, kTokens>;
  using Sums = TileSums<Shape, kTokens>;

 public:
  __device__ __forceinline__ WgmmaBlock(const ManyRowsArgs& args, const WeightRows& rows,
                                        const ManyRowsLaunch& launch, char* shared)
      : args_(args),
        rows_(rows),
        launch_(launch),
        activations_(shared),
        weights_(reinterpret_cast<Layout*>(shared + Shape::kWeightsAt)) {
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);
    weights_full_ = barriers;
    weights_free_ = weights_full_ + Shape::kWeightStages;
    activations_full_ = weights_free_ + Shape::kWeightStages;
    activations_free_ = activations_full_ + Shape::kActivationStages;
    others_left_ = activations_free_ + Shape::kActivationStages;
  }

  __device__ __forceinline__ void init_barriers() {
    for (uint32_t i = 0; i < Shape::kWeightStages; ++i) {
      ptx::barrier_init(&weights_full_[i], 1);
      ptx::barrier_init(&weights_free_[i], Shape::kConsumerWarps);
    }
    for (uint32_t i = 0; i < Shape::kActivationStages; ++i) {
      ptx::barrier_init(&activations_full_[i], 1);
      ptx::barrier_init(&activations_free_[i], Shape::kConsumerWarps);
    }
    ptx::barrier_init(others_left_, 1);
    ptx::barrier_init_fence();
  }

  __device__ __forceinline__ void produce_weights(uint32_t lane) {
    const uint32_t row_tiles = (rows_.rows + kTileRows - 1) / kTileRows;
    const uint32_t column_tiles = args_.activations.column_tiles;
    const uint64_t policy = ptx::evict_first_policy();
    RingPlace<Shape::kWeightStages> place;
    Segments segments(launch_);
    for (Segment segment; segments.next(segment);) {
      const ResultPlace at(launch_, segment.tile);
      const uint32_t first = at.row_block * Shape::kRowTiles;
      const uint32_t count = min(Shape::kRowTiles, row_tiles - first);
      const Layout* const tiles = static_cast<const Layout*>(rows_.data) +
                                  uint64_t(first + lane) * column_tiles + at.chunk * launch_.depth;
#pragma unroll 1  // within a producer's registers
      for (uint32_t column = segment.begin; column < segment.end; ++column) {
        ptx::barrier_wait(&weights_free_[place.slot], place.round ^ 1);
        uint64_t* const full = &weights_full_[place.slot];
        if (lane == 0) ptx::barrier_expect(full, count * uint32_t(sizeof(Layout)));
        __syncwarp();
        if (lane < count) {
          Layout* const slot = &weights_[place.slot * Shape::kRowTiles + lane];
          if (Shape::kStream) {
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
    constexpr uint32_t kGroupBytes = 8 * kBlockColumns * 2;
    constexpr uint32_t kBlocks = kTileColumns / kBlockColumns;
    const uint32_t block_bytes = args_.activations.row_groups() * kGroupBytes;
    RingPlace<Shape::kActivationStages> place;
    Segments segments(launch_);
    for (Segment segment; segments.next(segment);) {
      const ResultPlace at(launch_, segment.tile);
      const uint32_t first = at.token_block * Shape::kActivationBytes;  // in each block
      const uint32_t bytes = min(block_bytes - first, Shape::kActivationBytes);
      const char* from = reinterpret_cast<const char*>(args_.activations.values) + first +
                         uint64_t(at.chunk * launch_.depth + segment.begin) * kBlocks * block_bytes;
      uint32_t stages = (segment.end - segment.begin) * (kBlocks / Shape::kStageBlocks);
#pragma unroll 1
      for (; stages > 0; --stages) {
        ptx::barrier_wait(&activations_free_[place.slot], place.round ^ 1);
        uint64_t* const full = &activations_full_[place.slot];
        ptx::barrier_expect(full, Shape::kStageBlocks * bytes);
#pragma unroll
        for (uint32_t i = 0; i < Shape::kStageBlocks; ++i, from += block_bytes) {
          ptx::bulk_copy(
              activations_ + place.slot * Shape::kStageBytes + i * Shape::kActivationBytes, from,
              bytes, full);
        }
        place.advance();
      }
    }
  }

  // Looks out for what others leave of the tile that the block finishes.
  __device__ __forceinline__ void watch_others(uint32_t lane) {
    ptx::wait_for_dependencies();  // flags may be the launch in front's
    Segments segments(launch_);
    for (Segment segment; segments.next(segment);) {
      if (segment.begin > 0 || segment.end == launch_.depth) continue;
      for (uint32_t block = block_of(launch_) + 1 + lane; has_part(block, segment);
           block += kLanes) {
        while (ptx::load_acquire(flag(block)) == 0) __nanosleep(100);
        *flag(block) = 0;  // as the next launch wants it
      }
      __syncwarp();
      release(others_left_);
    }
  }

  __device__ __forceinline__ void consume() {
    Segments segments(launch_);
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
        Scales scales;  // asked for before what takes time
        load_scales(segment.tile, scales);
        if (segment.end < launch_.depth) add_others(segment, sums);
        store(segment.tile, scales, sums);
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
  using WeightScales = TileScales<Layout>[Shape::kWarpTiles];
  using Half = HalfTile<Layout>[Shape::kWarpTiles];
  __device__ __forceinline__ const Layout& tile(uint32_t i) const {
    return weights_[weights_place_.slot * Shape::kRowTiles + row_tile(i)];
  }
  __device__ __forceinline__ void load_scales_and_first_half(WeightScales& scales, Half& half) {
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
  }
  // Some time after the last load: those in flight would be waited for.
  __device__ __forceinline__ void release_weights() {
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
    constexpr int kSteps = 8, kBlockSteps = kSteps / int(Shape::kStageBlocks);
    uint64_t* done = nullptr;  // of the activations that instructions in flight still read
    __half2 left[2][Shape::kWarpTiles][4];
    WeightScales scales, next_scales;
    Half halves[2];
    load_scales_and_first_half(scales, halves[0]);
#pragma unroll 1
    for (uint32_t column = segment.begin; column < segment.end; ++column) {
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        ptx::barrier_wait(&activations_full_[activations_place_.slot], activations_place_.round);
        // From a shuffle, so that the compiler knows that all lanes have the same: then descriptors
        // need no instructions of the lanes.
        const uint32_t stage = __shfl_sync(~0u, activations_place_.slot * Shape::kStageBytes, 0);
        const uint64_t right = ptx::matrix_descriptor(activations_ + stage);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
#pragma unroll
          for (int j = 0; j < Shape::kWarpTiles; ++j)
            halves[group][j].weights(scales[j], group, step / 2, step % 2, left[step % 2][j]);
          ptx::wgmma_fence();
#pragma unroll
          for (int j = 0; j < Shape::kWarpTiles; ++j) {
            ptx::wgmma<kTokens>(sums[j], left[step % 2][j],
                                right + step / kBlockSteps * (Shape::kActivationBytes / 16) +
                                    step % kBlockSteps * ptx::kDescriptorStep);
          }
          ptx::wgmma_commit();
          if (group == 0 && step == 4) load_second_half(halves[1]);
          if (group == 0 && step == 6) release_weights();
          if (group == 1 && step == 4 && column + 1 < segment.end)
            load_scales_and_first_half(next_scales, halves[0]);
          ptx::wgmma_wait<1>();
          if (step == 0 && done) release(done);
        }
        done = &activations_free_[activations_place_.slot];
        activations_place_.advance();
      }
#pragma unroll
      for (int j = 0; j < Shape::kWarpTiles; ++j) scales[j] = next_scales[j];
    }
    ptx::wgmma_wait<0>();
    release(done);
  }

  // Where a block of the launch leaves the sums of a tile that another one finishes: one float4 of
  // each thread beside the other's. Launches side by side have places of their own.
  __device__ __forceinline__ float4* left_sums(uint32_t block) const {
    constexpr uint32_t kBlockFloats = Shape::kRows * kTokens;
    char* const sums = static_cast<char*>(args_.workspace) + kFlagBytes;
    return reinterpret_cast<float4*>(sums) +
           uint64_t(launch_.first_block + block) * (kBlockFloats / 4) + threadIdx.x;
  }
  __device__ __forceinline__ uint32_t* flag(uint32_t block) const {
    return static_cast<uint32_t*>(args_.workspace) + launch_.first_block + block;
  }

  __device__ __forceinline__ void leave_sums(const Sums& sums) {
    float4* const to = left_sums(block_of(launch_));
#pragma unroll
    for (int i = 0; i < Shape::kWarpTiles; ++i) {
#pragma unroll
      for (int j = 0; j < kTokens / 8; ++j) {
        const float* from = &sums[i][4 * j];
        to[(i * (kTokens / 8) + j) * Shape::kConsumers] = {from[0], from[1], from[2], from[3]};
      }
    }
    ptx::sync_threads(1, Shape::kConsumers);  // what all have written, one releases
    if (threadIdx.x == 0) ptx::store_release(flag(block_of(launch_)), 1);
  }

  // Whether the block, one behind this, works on the tile whose beginning is this one's.
  __device__ __forceinline__ bool has_part(uint32_t block, const Segment& segment) const {
    const uint32_t tile_end = (segment.tile - launch_.whole_tiles + 1) * launch_.depth;
    return block < launch_.sharing_blocks && launch_.share_begin(block) < tile_end;
  }
  // Adds what the next blocks leave for the tile's other columns, in their order.
  __device__ __forceinline__ void add_others(const Segment& segment, Sums& sums) {
    ptx::barrier_wait(others_left_, 0);
#pragma unroll 1
    for (uint32_t block = block_of(launch_) + 1; has_part(block, segment); ++block) {
      const float4* const from = left_sums(block);
#pragma unroll
      for (int i = 0; i < Shape::kWarpTiles; ++i) {
#pragma unroll
        for (int j = 0; j < kTokens / 8; ++j) {
          const float4 other = from[(i * (kTokens / 8) + j) * Shape::kConsumers];
          float* const to = &sums[i][4 * j];
          to[0] += other.x, to[1] += other.y, to[2] += other.z, to[3] += other.w;
        }
      }
    }
  }

  // Of a thread's sums: [token / 8][of two].
  using Scales = float[kTokens / 8][2];
  __device__ __forceinline__ static uint32_t first_token(const ResultPlace& at) {
    return at.token_block * kTokens + lane() % 4 * 2;
  }
  __device__ __forceinline__ void load_scales(uint32_t tile, Scales& scales) const {
    const uint32_t first = first_token(ResultPlace(launch_, tile));
#pragma unroll
    for (uint32_t i = 0; i < kTokens / 4; ++i) {
      const uint32_t token = first + i / 2 * 8 + i % 2;
      scales[i / 2][i % 2] =
          args_.scales && token < args_.activations.rows ? args_.scales[token] : 1.0f;
    }
  }
  // In few instructions: they run once, and come from far.
  __device__ __forceinline__ void store(uint32_t tile, const Scales& scales,
                                        const Sums& sums) const {
    const ResultPlace at(launch_, tile);
    const uint32_t token = first_token(at);
    const uint32_t row = at.row_block * Shape::kRows + row_tile(0) * kTileRows + lane() / 4;
    const int tokens = int(args_.activations.rows - token), rows = int(rows_.rows - row);
    float* const output =
        args_.output + (uint64_t(at.chunk) * args_.activations.rows + token) * args_.output_stride +
        rows_.first_output + row;
#pragma unroll
    for (int j = 0; j < kTokens / 4; ++j) {
      const int next_token = j / 2 * 8 + j % 2;
      float* const to = output + uint64_t(next_token) * args_.output_stride;
#pragma unroll
      for (int i = 0; i < Shape::kWarpTiles; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int next_row = 4 * kTileRows * i + 8 * half;
          if (next_token < tokens && next_row < rows)
            to[next_row] = scales[j / 2][j % 2] * sums[i][j / 2 * 4 + 2 * half + j % 2];
        }
      }
    }
  }

  const ManyRowsArgs& args_;
  const WeightRows& rows_;
  const ManyRowsLaunch& launch_;
  char* const activations_;
  Layout* const weights_;
  uint64_t *weights_full_, *weights_free_, *activations_full_, *activations_free_, *others_left_;
  RingPlace<Shape::kWeightStages> weights_place_;
  RingPlace<Shape::kActivationStages> activations_place_;
};

template <class Layout, int kTokens>
__device__ __forceinline__ void many_rows_block(const ManyRowsArgs& args, const WeightRows& rows,
                                                const ManyRowsLaunch& launch) {
  extern __shared__ __align__(1024) char shared[];
  using Shape = WgmmaShape<Layout, kTokens>;
  WgmmaBlock<Layout, kTokens> block(args, rows, launch, shared);
  if (threadIdx.x == 0) block.init_barriers();
  __syncthreads();
  if (threadIdx.x >= Shape::kConsumers) {
    ptx::give_up_registers<Shape::kProducerRegisters>();
    const uint32_t warp = (threadIdx.x - Shape::kConsumers) / kLanes, lane = threadIdx.x % kLanes;
    if (warp == 0) block.produce_weights(lane);
    if (warp == 1 && lane == 0) block.produce_activations();
    if (warp == 2) block.watch_others(lane);
    ptx::launch_dependents();
  } else {
    ptx::take_registers<Shape::kConsumerRegisters>();
    ptx::launch_dependents();
    block.consume();
  }
}
#endif

// The second layout, if any, is of a shape like the first.
template <class First, class Second, int kTokens>
__global__ void __launch_bounds__(WgmmaShape<First, kTokens>::kThreads,
                                  WgmmaShape<First, kTokens>::kSharers)
    many_rows_wgmma(const __grid_constant__ ManyRowsArgs args,
                    const __grid_constant__ ManyRowsLaunches launches) {
#if NIBBLE_HAS_WGMMA
  if constexpr (!std::is_same_v<Second, NoLayout>) {
    static_assert(WgmmaShape<First, kTokens>::kThreads == WgmmaShape<Second, kTokens>::kThreads);
    if (blockIdx.x >= launches.second.first_block)
      return many_rows_block<Second, kTokens>(args, args.weights[1], launches.second);
  }
  many_rows_block<First, kTokens>(args, args.weights[0], launches.first);
#endif
}

}  // namespace nibble::cuda
