#pragma once
// Attention of rows that share their sequence with others, on Hopper's asynchronous matrix
// instructions.
//
// Two blocks, a cluster, take one KV head and consecutive query tiles of it: their keys and values
// are the same, and each block brings half of them for both, because 64 queries a multiprocessor
// would else want 64 bytes a clock from the L2 cache, which gives 24. A block walks over tiles of
// 128 keys with four warpgroups:
//
//   scorer    multiplies 64 queries by 128 keys, leaves the weights in shared memory;
//   values    two, which multiply the weights by the values: the halves of head_dim 512, or for a
//             smaller head_dim the results of two query tiles, 64 x 256 at most, in registers;
//   loaders   bring keys and values by the copy engine, two rings of four slots.
//
// The scorer hands weights over one step late, when it has the next step's scores: so the tensor
// cores multiply values while it takes powers.

#include <cmath>

#include "cuda/attention/address_map.h"
#include "cuda/attention/heads.cuh"
#include "cuda/attention/kv_f16_tiles.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/ptx_hopper.cuh"
#include "cuda/ring.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

inline constexpr uint32_t kWarpgroupWarps = 4;
inline constexpr uint32_t kWarpgroup = kWarpgroupWarps * kLanes;
inline constexpr uint32_t kClusterBlocks = 2;

// What results must be multiplied by, beside the weights.
struct WeightFactors {
  float of_query[kQueryTile];
  uint32_t any[kWarpgroupWarps];  // whether one of the warp's queries has a factor but 1
};

template <class Kv>
struct PrefillWgmmaShape {
  static constexpr uint32_t kHeadDim = Kv::kHeadDim;
  static constexpr uint32_t kQueryTiles = kHeadDim == 512 ? 1 : 2;    // of a block
  static constexpr uint32_t kValueDims = kHeadDim * kQueryTiles / 2;  // of a warpgroup's results
  static constexpr uint32_t kSlots = 4;                               // of a ring
  static constexpr uint32_t kBlockBytes = kQueryTile * 128;  // 64 queries by 64 dims or keys
  static constexpr uint32_t kQueryTileBytes = kQueryTile * kHeadDim * 2;
  static constexpr uint32_t kWeightBytes = kQueryTile * kKeysPerTile * 2;
  // Shared memory.
  static constexpr uint32_t kKeysAt = kQueryTiles * kQueryTileBytes;
  static constexpr uint32_t kValuesAt = kKeysAt + kSlots * Kv::kSlotBytes;
  static constexpr uint32_t kWeightsAt = kValuesAt + kSlots * Kv::kSlotBytes;
  static constexpr uint32_t kFactorsAt = kWeightsAt + 2 * kWeightBytes;
  static constexpr uint32_t kBarriersAt = kFactorsAt + 2 * sizeof(WeightFactors);
  static constexpr uint32_t kBarriers = 4 * kSlots + 5;
  static constexpr uint32_t kBytes = kBarriersAt + kBarriers * sizeof(uint64_t);
  static_assert(kBytes <= (227 << 10));
};

#if NIBBLE_HAS_WGMMA
template <class Kv>
class PrefillWgmmaBlock {
  using Shape = PrefillWgmmaShape<Kv>;
  using Place = RingPlace<Shape::kSlots>;
  using Scores = float[kKeysPerTile / 2];
  // Of a warpgroup: the sums of products of at most 64 x 128, because an instruction cannot have
  // more registers than the kernel starts with.
  static constexpr uint32_t kProductDims = Shape::kValueDims < 128 ? Shape::kValueDims : 128;
  static constexpr uint32_t kProducts = Shape::kValueDims / kProductDims;
  using Results = float[kProducts][kProductDims / 2];
  static constexpr uint32_t kTilePages = kKeysPerTile / backend::kKvPageTokens;

 public:
  __device__ __forceinline__ PrefillWgmmaBlock(const AttentionKernelArgs& args, char* shared)
      : args_(args),
        tiles_(args.layer.shape),
        shared_(shared),
        factors_(reinterpret_cast<WeightFactors*>(shared + Shape::kFactorsAt)),
        lane_(threadIdx.x % kLanes),
        warp_(threadIdx.x / kLanes % kWarpgroupWarps) {
    uint64_t* barriers = reinterpret_cast<uint64_t*>(shared + Shape::kBarriersAt);
    keys_full_ = barriers;
    keys_free_ = keys_full_ + Shape::kSlots;
    values_full_ = keys_free_ + Shape::kSlots;
    values_free_ = values_full_ + Shape::kSlots;
    weights_full_ = values_free_ + Shape::kSlots;
    weights_free_ = weights_full_ + 2;
    queries_full_ = weights_free_ + 2;

    const uint32_t cluster = blockIdx.x / kClusterBlocks;
    constexpr uint32_t kTiles = kClusterBlocks * Shape::kQueryTiles;
    kv_head_ = cluster % tiles_.kv_heads;
    // The last rows, which see most, come first.
    const uint32_t group =
        gridDim.x / kClusterBlocks / tiles_.kv_heads - 1 - cluster / tiles_.kv_heads;
    first_tile_ = group * kTiles + ptx::cluster_rank() * Shape::kQueryTiles;
    first_row_ = args.launch.single_rows + group * kTiles * tiles_.tile_tokens;
    rows_end_ = min(first_row_ + kTiles * tiles_.tile_tokens, args.launch.rows);
  }

  __device__ __forceinline__ void init_barriers() {
    constexpr uint32_t kValueWarps = 2 * kWarpgroupWarps;
    for (uint32_t i = 0; i < Shape::kSlots; ++i) {
      ptx::barrier_init(&keys_full_[i], 1);
      ptx::barrier_init(&keys_free_[i], kClusterBlocks * kWarpgroupWarps);
      ptx::barrier_init(&values_full_[i], 1);
      ptx::barrier_init(&values_free_[i], kClusterBlocks * kValueWarps);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      ptx::barrier_init(&weights_full_[i], kWarpgroupWarps);
      ptx::barrier_init(&weights_free_[i], kValueWarps / Shape::kQueryTiles);
    }
    ptx::barrier_init(queries_full_, 1);
    ptx::barrier_init_fence();
  }

  __device__ __forceinline__ void load_queries() const {
    ptx::barrier_expect(queries_full_, Shape::kQueryTiles * Shape::kQueryTileBytes);
    for (uint32_t i = 0; i < Shape::kQueryTiles; ++i)
      ptx::bulk_copy(shared_ + i * Shape::kQueryTileBytes,
                     args_.queries + tiles_.tile(first_tile_ + i, kv_head_), Shape::kQueryTileBytes,
                     queries_full_);
  }

  __device__ __forceinline__ void load_keys(const CUtensorMap& map) const {
    Kv kv(args_, map, args_.layer.kv.key_offset, kv_head_);
    load(kv, shared_ + Shape::kKeysAt, keys_full_, keys_free_,
         [&](char* slot, uint32_t i, uint64_t* full) { kv.load_keys(slot, i, full); });
  }
  __device__ __forceinline__ void load_values(const CUtensorMap& map) const {
    const KvRows& rows = args_.layer.kv;
    Kv kv(args_, map, rows.value_offset + 2 * rows.order.value_begin(), kv_head_);
    load(kv, shared_ + Shape::kValuesAt, values_full_, values_free_,
         [&](char* slot, uint32_t i, uint64_t* full) { kv.load_values(slot, i, full); });
  }

  __device__ __forceinline__ void score() {
    Softmax softmax[Shape::kQueryTiles];
    Place place;
    uint32_t step = 0;
    ptx::barrier_wait(queries_full_, 0);
    for (uint32_t begin = first_row_; begin < rows_end_;) {
      const Run run(args_, begin, rows_end_);
#pragma unroll 1
      for (uint32_t page = run.first_page; page < run.pages_end; page += kTilePages) {
        Place at = place;
#pragma unroll
        for (uint32_t i = 0; i < Shape::kQueryTiles; ++i) {
          at = place;
          Scores scores;
          multiply_keys(i, i + 1 == Shape::kQueryTiles, at, scores);
          if (step > 0) hand_over(step - 1);
          mask(run, i, page * backend::kKvPageTokens, scores);
          WeightFactors& factors = factors_[step % 2];
          ptx::barrier_wait(&weights_free_[step % 2], step / 2 % 2 ^ 1);
          softmax[i].weigh(scores, factors, warp_, lane_);
          store_weights(step % 2, scores);
          ++step;
        }
        place = at;
      }
      begin = run.end;
    }
    hand_over(step - 1);
    // In place of further weights: what ends the results.
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      ptx::barrier_wait(&weights_free_[step % 2], step / 2 % 2 ^ 1);
      softmax[i % Shape::kQueryTiles].end(factors_[step % 2], warp_, lane_);
      __syncwarp();
      hand_over(step);
      ++step;
      if (Shape::kQueryTiles == 1) break;
    }
  }

  // `index`: which of the two warpgroups.
  __device__ __forceinline__ void multiply_values(uint32_t index) {
    Results results;
#pragma unroll
    for (auto& product : results) {
#pragma unroll
      for (float& result : product) result = 0;
    }
    Place place;
    uint32_t step = Shape::kQueryTiles == 2 ? index : 0;
    for (uint32_t begin = first_row_; begin < rows_end_;) {
      const Run run(args_, begin, rows_end_);
#pragma unroll 1
      for (uint32_t page = run.first_page; page < run.pages_end; page += kTilePages) {
        ptx::barrier_wait(&weights_full_[step % 2], step / 2 % 2);
        if (factors_[step % 2].any[warp_]) scale(factors_[step % 2], results);
        const uint32_t first = page * backend::kKvPageTokens;
        const uint32_t stored = run.stored > first ? run.stored - first : 0;
#pragma unroll
        for (uint32_t slot = 0; slot < Kv::kSlotsPerTile; ++slot) {
          ptx::barrier_wait(&values_full_[place.slot], place.round);
          if (stored < (slot + 1) * Kv::kValueSlotKeys)
            clear_values(index, place, stored - min(stored, slot * Kv::kValueSlotKeys));
          ptx::wgmma_fence();
          multiply_slot(index, step % 2, slot, place, results);
          ptx::wgmma_commit();
          if (slot > 0) {
            ptx::wgmma_wait<1>();
            release(&values_free_[previous(place)]);
          }
          place.advance();
        }
        ptx::wgmma_wait<0>();
        release(&values_free_[previous(place)]);
        __syncwarp();  // all lanes have read the factors
        if (lane_ == 0) ptx::barrier_arrive(&weights_free_[step % 2]);
        step += Shape::kQueryTiles;
      }
      begin = run.end;
    }
    ptx::barrier_wait(&weights_full_[step % 2], step / 2 % 2);
    scale(factors_[step % 2], results);
    write_results(index, results);
  }

 private:
  // A warp's queries and their softmax. Lane 4 g + t has the queries g and g + 8, and of their keys
  // 2 t and 2 t + 1 of each eight.
  struct Softmax {
    float base[2] = {-INFINITY, -INFINITY};  // weights are 2^(score - base)
    float sums[2] = {};                      // over this lane's keys

    // Scores to weights. The base is the largest score, or at least within kSlack of it: results
    // need hardly ever be multiplied, and weights are at most 2^kSlack, in f16.
    __device__ __forceinline__ void weigh(Scores& scores, WeightFactors& factors, uint32_t warp,
                                          uint32_t lane) {
      constexpr float kSlack = 8;
      bool any = false;
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        float largest = -INFINITY;
#pragma unroll
        for (uint32_t j = 0; j < kKeysPerTile / 8; ++j)
          largest = fmaxf(largest, fmaxf(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
        float factor = 1;
        if (largest > base[i] + kSlack) {
          factor = ptx::power_of_2(base[i] - largest);
          base[i] = largest;
          sums[i] *= factor;
          any = true;
        }
        if (lane % 4 == 0) factors.of_query[warp * 16 + lane / 4 + 8 * i] = factor;
        const float zero = base[i] == -INFINITY ? 0.0f : base[i];  // it has seen nothing yet
#pragma unroll
        for (uint32_t j = 0; j < kKeysPerTile / 8; ++j) {
#pragma unroll
          for (uint32_t k = 0; k < 2; ++k) {
            float& score = scores[4 * j + 2 * i + k];
            score = ptx::power_of_2(score - zero);
            sums[i] += score;
          }
        }
      }
      any = __any_sync(kAllLanes, any);
      if (lane == 0) factors.any[warp] = any;
    }

    __device__ __forceinline__ void end(WeightFactors& factors, uint32_t warp, uint32_t lane) {
#pragma unroll
      for (uint32_t i = 0; i < 2; ++i) {
        sums[i] += __shfl_xor_sync(kAllLanes, sums[i], 1);
        sums[i] += __shfl_xor_sync(kAllLanes, sums[i], 2);
        if (lane % 4 == 0) factors.of_query[warp * 16 + lane / 4 + 8 * i] = 1 / sums[i];
      }
    }
  };

  __device__ __forceinline__ static uint32_t previous(const Place& place) {
    return (place.slot + Shape::kSlots - 1) % Shape::kSlots;
  }
  // Gives a slot back, to the loaders of both blocks.
  __device__ __forceinline__ void release(uint64_t* free) const {
    if (lane_ < kClusterBlocks) ptx::barrier_arrive_at(free, lane_);
  }
  // Of a step, written and published before.
  __device__ __forceinline__ void hand_over(uint32_t step) const {
    if (lane_ == 0) ptx::barrier_arrive(&weights_full_[step % 2]);
  }

  template <class Load>
  __device__ __forceinline__ void load(Kv& kv, char* ring, uint64_t* full, uint64_t* free,
                                       const Load& load) const {
    Place place;
    for (uint32_t begin = first_row_; begin < rows_end_;) {
      const Run run(args_, begin, rows_end_);
      const uint32_t sequence = args_.step.places[run.begin].sequence;
      kv.prepare_tile(sequence, run.first_page, run.pages_end);
#pragma unroll 1
      for (uint32_t page = run.first_page; page < run.pages_end; page += kTilePages) {
        kv.begin_tile();
        kv.prepare_tile(sequence, page + kTilePages, run.pages_end);
#pragma unroll 1
        for (uint32_t slot = 0; slot < Kv::kSlotsPerTile; ++slot) {
          ptx::barrier_wait(&free[place.slot], place.round ^ 1);
          if (lane_ == 0) ptx::barrier_expect(&full[place.slot], Kv::kSlotBytes);
          __syncwarp();
          load(ring + place.slot * Kv::kSlotBytes, slot, &full[place.slot]);
          place.advance();
        }
      }
      begin = run.end;
    }
  }

  // Scores of the block's query tile `index`; `last`: it gives the slots back.
  __device__ __forceinline__ void multiply_keys(uint32_t index, bool last, Place& place,
                                                Scores& scores) const {
    const char* const queries = shared_ + index * Shape::kQueryTileBytes;
#pragma unroll
    for (uint32_t slot = 0; slot < Kv::kSlotsPerTile; ++slot) {
      ptx::barrier_wait(&keys_full_[place.slot], place.round);
      const uint64_t left = ptx::matrix_descriptor(queries + slot * Shape::kBlockBytes);
      const uint64_t right =
          ptx::matrix_descriptor(shared_ + Shape::kKeysAt + place.slot * Kv::kSlotBytes);
      ptx::wgmma_fence();
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i)
        ptx::wgmma_shared<kKeysPerTile, false>(scores, left + i * ptx::kDescriptorStep,
                                               right + i * ptx::kDescriptorStep, slot + i > 0);
      ptx::wgmma_commit();
      if (last && slot > 0) {
        ptx::wgmma_wait<1>();
        release(&keys_free_[previous(place)]);
      }
      place.advance();
    }
    ptx::wgmma_wait<0>();
    if (last) release(&keys_free_[previous(place)]);
  }

  // Takes off the keys that a query does not see.
  __device__ __forceinline__ void mask(const Run& run, uint32_t index, uint32_t first_key,
                                       Scores& scores) const {
    const uint32_t window = args_.layer.window;
    const uint32_t first_row =
        args_.launch.single_rows + (first_tile_ + index) * tiles_.tile_tokens;
    const uint32_t last_row = first_row + tiles_.tile_tokens - 1;
    if (run.seen(first_row, window).has(first_key + kKeysPerTile - 1) &&
        run.seen(last_row, window).has(first_key))
      return;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t query = warp_ * 16 + lane_ / 4 + 8 * i;
      const typename Run::Seen seen = run.seen(first_row + query / tiles_.ratio, window);
#pragma unroll
      for (uint32_t j = 0; j < kKeysPerTile / 4; ++j) {
        float& score = scores[j / 2 * 4 + 2 * i + j % 2];
        if (!seen.has(first_key + j / 2 * 8 + lane_ % 4 * 2 + j % 2)) score = -INFINITY;
      }
    }
  }

  __device__ __forceinline__ char* weights(uint32_t buffer) const {
    return shared_ + Shape::kWeightsAt + buffer * Shape::kWeightBytes;
  }

  // As left operand: two blocks of 64 queries by 64 keys.
  __device__ __forceinline__ void store_weights(uint32_t buffer, const Scores& scores) const {
    const uint32_t query = warp_ * 16 + lane_ % 16;
    const uint32_t row = ptx::shared_address(weights(buffer)) + query * 128;
#pragma unroll
    for (uint32_t j = 0; j < kKeysPerTile / 8; j += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        const float* const pair = &scores[4 * j + 2 * k];
        matrices[k] = ptx::as_bits(__floats2half2_rn(pair[0], pair[1]));
      }
      const uint32_t chunk = j + lane_ / 16;
      ptx::store_matrices(row + j / 8 * Shape::kBlockBytes + (chunk ^ query) % 8 * 16, matrices);
    }
    ptx::publish_shared_writes();
    __syncwarp();
  }

  __device__ __forceinline__ char* values(uint32_t index, const Place& place) const {
    const uint32_t first_block = Shape::kQueryTiles == 1 ? index * (Shape::kValueDims / 64) : 0;
    return shared_ + Shape::kValuesAt + place.slot * Kv::kSlotBytes +
           first_block * Kv::kValueSlotKeys * 128;
  }

  // Zeros in place of keys that do not exist, from key `first` of the slot on: what is there may
  // be no numbers, and 0 times that is not 0.
  __device__ __forceinline__ void clear_values(uint32_t index, const Place& place,
                                               uint32_t first) const {
    char* const slot = values(index, place);
    const uint32_t chunks = (Kv::kValueSlotKeys - first) * 8;
    for (uint32_t block = 0; block < Shape::kValueDims / 64; ++block) {
      char* const from = slot + (block * Kv::kValueSlotKeys + first) * 128;
      for (uint32_t i = threadIdx.x % kWarpgroup; i < chunks; i += kWarpgroup)
        *reinterpret_cast<uint4*>(from + i * 16) = {};
    }
    ptx::publish_shared_writes();
    ptx::sync_threads(1 + index, kWarpgroup);
  }

  __device__ __forceinline__ void multiply_slot(uint32_t index, uint32_t buffer, uint32_t slot,
                                                const Place& place, Results& results) const {
#pragma unroll
    for (uint32_t i = 0; i < Kv::kValueSlotKeys / 16; ++i) {
      const uint32_t key = slot * Kv::kValueSlotKeys + 16 * i;
      const uint64_t left =
          ptx::matrix_descriptor(weights(buffer) + key / 64 * Shape::kBlockBytes) +
          key % 64 / 16 * ptx::kDescriptorStep;
#pragma unroll
      for (uint32_t j = 0; j < kProducts; ++j) {
        constexpr uint32_t kNextColumns = Kv::kValueSlotKeys * 128;
        const uint64_t right = ptx::matrix_descriptor(
            values(index, place) + j * (kProductDims / 64) * kNextColumns + i * 2048, kNextColumns);
        ptx::wgmma_shared<kProductDims, true>(results[j], left, right, true);
      }
    }
  }

  __device__ __forceinline__ void scale(const WeightFactors& factors, Results& results) const {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const float factor = factors.of_query[warp_ * 16 + lane_ / 4 + 8 * i];
#pragma unroll
      for (auto& product : results) {
#pragma unroll
        for (uint32_t j = 0; j < kProductDims / 4; ++j)
          product[j / 2 * 4 + 2 * i + j % 2] *= factor;
      }
    }
  }

  // Four lanes of a row hold columns 2 t and 2 t + 1 of each eight of 32; then all of the t-th.
  __device__ __forceinline__ void exchange(uint32_t (&pairs)[4]) const {
#pragma unroll
    for (uint32_t distance = 1; distance <= 2; distance *= 2) {
      const bool upper = lane_ & distance;
#pragma unroll
      for (uint32_t k = 0; k < 2; ++k) {
        const uint32_t i = distance == 1 ? 2 * k : k, j = i + distance;
        const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? pairs[i] : pairs[j], distance);
        (upper ? pairs[i] : pairs[j]) = got;
      }
    }
  }

  __device__ __forceinline__ void write_results(uint32_t index, const Results& results) const {
    const uint32_t tile = first_tile_ + (Shape::kQueryTiles == 2 ? index : 0);
    const uint32_t first_dim = Shape::kQueryTiles == 1 ? index * Shape::kValueDims : 0;
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t query = warp_ * 16 + lane_ / 4 + 8 * i;
      const uint32_t in_tile = query / tiles_.ratio;
      const uint32_t row = args_.launch.single_rows + tile * tiles_.tile_tokens + in_tile;
      const bool exists = in_tile < tiles_.tile_tokens && row < args_.launch.rows;
#pragma unroll
      for (uint32_t j = 0; j < Shape::kValueDims / 32; ++j) {
        uint32_t pairs[4];
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) {
          const float* const pair =
              &results[32 * j / kProductDims][32 * j % kProductDims / 2 + 4 * k + 2 * i];
          pairs[k] = ptx::as_bits(__floats2half2_rn(pair[0], pair[1]));
        }
        exchange(pairs);
        float eight[8];
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) {
          const float2 pair = __half22float2(ptx::as_half2(pairs[k]));
          eight[2 * k] = pair.x, eight[2 * k + 1] = pair.y;
        }
        if (exists)
          store_result(args_, tiles_, tile, kv_head_, query, first_dim + 32 * j + lane_ % 4 * 8,
                       eight);
      }
    }
  }

  const AttentionKernelArgs& args_;
  const QueryTiles tiles_;
  char* const shared_;
  WeightFactors* const factors_;
  uint64_t *keys_full_, *keys_free_, *values_full_, *values_free_;
  uint64_t *weights_full_, *weights_free_, *queries_full_;
  const uint32_t lane_, warp_;  // of the warpgroup
  uint32_t kv_head_;
  uint32_t first_tile_;            // of the block
  uint32_t first_row_, rows_end_;  // of the cluster
};
#define NIBBLE_CLUSTER __cluster_dims__(kClusterBlocks, 1, 1)
#else
#define NIBBLE_CLUSTER
#endif

template <class Kv>
__global__ void __launch_bounds__(4 * kWarpgroup, 1) NIBBLE_CLUSTER
    prefill_wgmma(const __grid_constant__ AttentionKernelArgs args,
                  const __grid_constant__ CUtensorMap map) {
#if NIBBLE_HAS_WGMMA
  extern __shared__ __align__(1024) char shared[];
  PrefillWgmmaBlock<Kv> block(args, shared);
  if (threadIdx.x == 0) block.init_barriers();
  ptx::launch_dependents();
  ptx::cluster_sync();
  const uint32_t warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup == 0) {
    ptx::take_registers<144>();
    block.score();
  } else if (warpgroup < 3) {
    ptx::take_registers<168>();
    block.multiply_values(warpgroup - 1);
  } else {
    ptx::give_up_registers<32>();
    ptx::wait_for_dependencies();
    const uint32_t warp = threadIdx.x / kLanes % kWarpgroupWarps;
    if (warp == 0) block.load_keys(map);
    if (warp == 1) block.load_values(map);
    if (warp == 2 && threadIdx.x % kLanes == 0) block.load_queries();
    __syncwarp();
  }
  ptx::cluster_sync();  // the other block may still report to this one's barriers
#endif
}
#undef NIBBLE_CLUSTER

template <class Kv>
void launch_prefill_wgmma(cudaStream_t stream, const AttentionKernelArgs& args) {
  constexpr uint32_t kBytes = PrefillWgmmaShape<Kv>::kBytes;
  const auto kernel = prefill_wgmma<Kv>;
  NIBBLE_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t rows = args.launch.rows - args.launch.single_rows;
  const uint32_t cluster_rows =
      kClusterBlocks * PrefillWgmmaShape<Kv>::kQueryTiles * query_tile_tokens(shape);
  const uint32_t clusters = (rows + cluster_rows - 1) / cluster_rows * shape.kv_heads;
  launch_dependent(stream, kernel, clusters * kClusterBlocks, 4 * kWarpgroup, kBytes, args,
                   Kv::map(args.layer.kv));
}

}  // namespace nibble::cuda
