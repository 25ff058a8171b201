#pragma once
// What the blocks of prefill attention on Hopper's asynchronous matrix instructions have in common:
// rings of keys and values, products of queries and keys, softmax, results.

#include <cmath>

#include "cuda/attention/address_map.h"
#include "cuda/attention/heads.cuh"
#include "cuda/attention/kv_f16_tiles.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/ptx_hopper.cuh"
#include "cuda/ring.cuh"

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
  static constexpr uint32_t kQueryTiles = kHeadDim == 512 ? 1 : 2;  // of a block
  static constexpr uint32_t kScorers = kQueryTiles;  // warpgroups that multiply queries by keys
  static constexpr uint32_t kThreads = (kQueryTiles == 1 ? 4 : 3) * kWarpgroup;
  static constexpr uint32_t kValueDims = kHeadDim * kQueryTiles / 2;  // of a warpgroup's results
  static constexpr uint32_t kSlots = kQueryTiles == 1 ? 4 : 5;        // of a ring
  static constexpr uint32_t kBlockBytes = kQueryTile * 128;  // 64 queries by 64 dims or keys
  static constexpr uint32_t kQueryTileBytes = kQueryTile * kHeadDim * 2;
  // Of one query tile's weights, which go from one warpgroup to others.
  static constexpr uint32_t kWeightBytes = kQueryTiles == 1 ? kQueryTile * kKeysPerTile * 2 : 0;
  static constexpr uint32_t kFactorBytes = kQueryTiles == 1 ? sizeof(WeightFactors) : 0;
  // Shared memory.
  static constexpr uint32_t kKeysAt = kQueryTiles * kQueryTileBytes;
  static constexpr uint32_t kValuesAt = kKeysAt + kSlots * Kv::kSlotBytes;
  static constexpr uint32_t kWeightsAt = kValuesAt + kSlots * Kv::kSlotBytes;
  static constexpr uint32_t kFactorsAt = kWeightsAt + 2 * kWeightBytes;
  static constexpr uint32_t kBarriersAt = kFactorsAt + 2 * kFactorBytes;
  static constexpr uint32_t kBarriers = 4 * kSlots + 5;
  static constexpr uint32_t kBytes = kBarriersAt + kBarriers * sizeof(uint64_t);
  static_assert(kBytes <= (227 << 10));
  // What a block leaves in KeySection::state: results, then softmax; a thread's vectors stand
  // kWarpgroup apart.
  static constexpr uint32_t kResultVectors = kValueDims / 8;  // of a thread
  static constexpr uint32_t kSoftmaxAt = 2 * kResultVectors * kWarpgroup;
  static constexpr uint32_t kStateVectors = kSoftmaxAt + kQueryTiles * kWarpgroup;
};

#if NIBBLE_HAS_WGMMA
// A warp's queries and their softmax. Lane 4 g + t has the queries g and g + 8, and of their keys
// 2 t and 2 t + 1 of each eight.
class Softmax {
 public:
  using Scores = float[kKeysPerTile / 2];

  __device__ __forceinline__ float4 state() const {
    return {base_[0], base_[1], sums_[0], sums_[1]};
  }
  __device__ __forceinline__ void set(const float4& state) {
    base_[0] = state.x, base_[1] = state.y, sums_[0] = state.z, sums_[1] = state.w;
  }

  // Scores to weights. The base is the largest score, or at least within kSlack of it: results need
  // hardly ever be multiplied, and weights are at most 2^kSlack, in f16. Returns whether a query of
  // the warp has a factor but 1, by which its results so far must be multiplied.
  __device__ __forceinline__ bool weigh(Scores& scores, float (&factors)[2]) {
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
      factors[i] = 1;
      if (largest > base_[i] + kSlack) {
        factors[i] = ptx::power_of_2(base_[i] - largest);
        base_[i] = largest;
        sums_[i] *= factors[i];
        any = true;
      }
      const float zero = base_[i] == -INFINITY ? 0.0f : base_[i];  // it has seen nothing yet
#pragma unroll
      for (uint32_t j = 0; j < kKeysPerTile / 8; ++j) {
#pragma unroll
        for (uint32_t k = 0; k < 2; ++k) {
          float& score = scores[4 * j + 2 * i + k];
          score = ptx::power_of_2(score - zero);
          sums_[i] += score;
        }
      }
    }
    return __any_sync(kAllLanes, any);
  }

  // By what results are to be multiplied in the end.
  __device__ __forceinline__ void end(float (&factors)[2]) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      sums_[i] += __shfl_xor_sync(kAllLanes, sums_[i], 1);
      sums_[i] += __shfl_xor_sync(kAllLanes, sums_[i], 2);
      factors[i] = 1 / sums_[i];
    }
  }

 private:
  float base_[2] = {-INFINITY, -INFINITY};  // weights are 2^(score - base)
  float sums_[2] = {};                      // over this lane's keys
};

template <class Kv>
class PrefillWgmmaBlock {
 protected:
  using Shape = PrefillWgmmaShape<Kv>;
  using Place = RingPlace<Shape::kSlots>;
  using Scores = Softmax::Scores;
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
      ptx::barrier_init(&keys_free_[i], kClusterBlocks * Shape::kScorers * kWarpgroupWarps);
      ptx::barrier_init(&values_full_[i], 1);
      ptx::barrier_init(&values_free_[i], kClusterBlocks * kValueWarps);
    }
    for (uint32_t i = 0; i < 2; ++i) {
      // Every lane that writes or reads factors arrives itself: one that does it for its warp would
      // do, but racecheck does not see that the others have met it.
      ptx::barrier_init(&weights_full_[i], kWarpgroupWarps * kLanes / 4);
      ptx::barrier_init(&weights_free_[i], kValueWarps * kLanes);
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

 protected:
  // The block's query tile `index` begins with it.
  __device__ __forceinline__ uint32_t tile_row(uint32_t index) const {
    return args_.launch.single_rows + (first_tile_ + index) * tiles_.tile_tokens;
  }

  // body(run, first key of a tile), for all tiles of keys.
  template <class Body>
  __device__ __forceinline__ void for_each_key_tile(const Body& body) const {
    for (uint32_t begin = first_row_; begin < rows_end_;) {
      const Run run(args_, begin, rows_end_);
#pragma unroll 1
      for (uint32_t page = run.first_page; page < run.pages_end; page += kTilePages)
        body(run, page * backend::kKvPageTokens);
      begin = run.end;
    }
  }

  // Scores of the block's query tile `index`; gives the slots of keys back.
  __device__ __forceinline__ void multiply_keys(uint32_t index, Place& place,
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
      if (slot > 0) {
        ptx::wgmma_wait<1>();
        release(&keys_free_[previous(place)]);
      }
      place.advance();
    }
    ptx::wgmma_wait<0>();
    release(&keys_free_[previous(place)]);
  }

  // Takes off the keys that a query does not see.
  __device__ __forceinline__ void mask(const Run& run, uint32_t index, uint32_t first_key,
                                       Scores& scores) const {
    const uint32_t window = args_.layer.window;
    const uint32_t first_row = tile_row(index);
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

  // The values of a tile of keys, of which `stored` exist, by weights: multiply(slot, step, j,
  // right) starts the product of the weights of keys [slot keys + 16 step, 16 more) and the values
  // `right`, columns [j kProductDims, ...) of the results from `first_dim` on. Gives the slots
  // back. `index`: of the warpgroup, among two.
  template <class Multiply>
  __device__ __forceinline__ void multiply_values(uint32_t index, uint32_t first_dim,
                                                  uint32_t stored, Place& place,
                                                  const Multiply& multiply) const {
    constexpr uint32_t kNextColumns = Kv::kValueSlotKeys * 128;
#pragma unroll
    for (uint32_t slot = 0; slot < Kv::kSlotsPerTile; ++slot) {
      ptx::barrier_wait(&values_full_[place.slot], place.round);
      char* const values =
          shared_ + Shape::kValuesAt + place.slot * Kv::kSlotBytes + first_dim / 64 * kNextColumns;
      if (stored < (slot + 1) * Kv::kValueSlotKeys)
        clear_values(index, values, stored - min(stored, slot * Kv::kValueSlotKeys));
      ptx::wgmma_fence();
#pragma unroll
      for (uint32_t i = 0; i < Kv::kValueSlotKeys / 16; ++i) {
#pragma unroll
        for (uint32_t j = 0; j < kProducts; ++j)
          multiply(slot, i, j,
                   ptx::matrix_descriptor(
                       values + j * (kProductDims / 64) * kNextColumns + i * 2048, kNextColumns));
      }
      ptx::wgmma_commit();
      if (slot > 0) {
        ptx::wgmma_wait<1>();
        release(&values_free_[previous(place)]);
      }
      place.advance();
    }
    ptx::wgmma_wait<0>();
    release(&values_free_[previous(place)]);
  }

  // A slot is not needed; `full` and `free` are its ring's.
  __device__ __forceinline__ void skip_slots(uint64_t* full, uint64_t* free, Place& place) const {
#pragma unroll 1
    for (uint32_t slot = 0; slot < Kv::kSlotsPerTile; ++slot) {
      ptx::barrier_wait(&full[place.slot], place.round);
      release(&free[place.slot]);
      place.advance();
    }
  }

  // Gives a slot back, to the loaders of both blocks.
  __device__ __forceinline__ void release(uint64_t* free) const {
    if (lane_ < kClusterBlocks) ptx::barrier_arrive_at(free, lane_);
  }

  // factors: of the lane's queries
  __device__ __forceinline__ static void scale(const float (&factors)[2], Results& results) {
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
#pragma unroll
      for (auto& product : results) {
#pragma unroll
        for (uint32_t j = 0; j < kProductDims / 4; ++j)
          product[j / 2 * 4 + 2 * i + j % 2] *= factors[i];
      }
    }
  }

  // Results and softmax as the section before has left them, and for the next one. `index`: of the
  // warpgroup, among two that have results; of the query tile.
  __device__ __forceinline__ void load_results(uint32_t index, Results& results) const {
    if (args_.section.is_first) return;
    for_each_four(results, [&](uint32_t i, float* four) {
      const float4 left = thread_state()[(index * Shape::kResultVectors + i) * kWarpgroup];
      four[0] = left.x, four[1] = left.y, four[2] = left.z, four[3] = left.w;
    });
  }
  __device__ __forceinline__ void leave_results(uint32_t index, Results& results) const {
    for_each_four(results, [&](uint32_t i, const float* four) {
      thread_state()[(index * Shape::kResultVectors + i) * kWarpgroup] = {four[0], four[1], four[2],
                                                                          four[3]};
    });
  }
  __device__ __forceinline__ void load_softmax(uint32_t index, Softmax& softmax) const {
    if (args_.section.is_first) return;
    softmax.set(thread_state()[Shape::kSoftmaxAt + index * kWarpgroup]);
  }
  __device__ __forceinline__ void leave_softmax(uint32_t index, const Softmax& softmax) const {
    thread_state()[Shape::kSoftmaxAt + index * kWarpgroup] = softmax.state();
  }

  // Of the block's query tile `index`, columns from `first_dim` on.
  __device__ __forceinline__ void write_results(uint32_t index, uint32_t first_dim,
                                                const Results& results) const {
    const bool in_chunks = Shape::kValueDims % kTileColumns == 0 && args_.step.output.in_blocks &&
                           !args_.layer.kv.restores_results();
    const auto pair_at = [&](uint32_t column, uint32_t i) {  // column: a multiple of 8
      const float* const pair = &results[column / kProductDims][column % kProductDims / 2 + 2 * i];
      return __floats2half2_rn(pair[0], pair[1]);
    };
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t query = warp_ * 16 + lane_ / 4 + 8 * i;
      const uint32_t in_tile = query / tiles_.ratio, row = tile_row(index) + in_tile;
      const bool exists = in_tile < tiles_.tile_tokens && row < args_.launch.rows;
      if (in_chunks) {
        const uint32_t head = kv_head_ * tiles_.ratio + query % tiles_.ratio;
        const uint32_t begin = head * Shape::kHeadDim + first_dim + lane_ % 4 * 2;
#pragma unroll
        for (uint32_t tile = 0; tile < Shape::kValueDims; tile += kTileColumns) {
#pragma unroll
          for (uint32_t j = tile; j < tile + kLaneColumns; j += 8) {
            const __half2 chunk[] = {pair_at(j, i), pair_at(j + kLaneColumns, i),
                                     pair_at(j + 2 * kLaneColumns, i),
                                     pair_at(j + 3 * kLaneColumns, i)};
            if (exists) store_activation_chunk(args_.step.output, row, begin + j, chunk);
          }
        }
        continue;
      }
#pragma unroll
      for (uint32_t j = 0; j < Shape::kValueDims; j += 32) {
        uint32_t pairs[4];
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) pairs[k] = ptx::as_bits(pair_at(j + 8 * k, i));
        exchange(pairs);
        float eight[8];
#pragma unroll
        for (uint32_t k = 0; k < 4; ++k) {
          const float2 pair = __half22float2(ptx::as_half2(pairs[k]));
          eight[2 * k] = pair.x, eight[2 * k + 1] = pair.y;
        }
        if (exists)
          store_result(args_, tiles_, first_tile_ + index, kv_head_, query,
                       first_dim + j + lane_ % 4 * 8, eight);
      }
    }
  }

  const AttentionKernelArgs& args_;
  const QueryTiles tiles_;
  char* const shared_;
  uint64_t *keys_full_, *keys_free_, *values_full_, *values_free_;
  uint64_t *weights_full_, *weights_free_, *queries_full_;
  const uint32_t lane_, warp_;  // of the warpgroup
  uint32_t kv_head_;
  uint32_t first_tile_;            // of the block
  uint32_t first_row_, rows_end_;  // of the cluster

 private:
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

  __device__ __forceinline__ static uint32_t previous(const Place& place) {
    return (place.slot + Shape::kSlots - 1) % Shape::kSlots;
  }

  // Zeros in place of keys that do not exist, from key `first` of the slot on: what is there may
  // be no numbers, and 0 times that is not 0.
  __device__ __forceinline__ void clear_values(uint32_t index, char* values, uint32_t first) const {
    const uint32_t chunks = (Kv::kValueSlotKeys - first) * 8;
    for (uint32_t block = 0; block < Shape::kValueDims / 64; ++block) {
      char* const from = values + (block * Kv::kValueSlotKeys + first) * 128;
      for (uint32_t i = threadIdx.x % kWarpgroup; i < chunks; i += kWarpgroup)
        *reinterpret_cast<uint4*>(from + i * 16) = {};
    }
    ptx::publish_shared_writes();
    ptx::sync_threads(1 + index, kWarpgroup);
  }

  // body(i, p): the i-th four of a thread's results stand at p.
  template <class Body>
  __device__ __forceinline__ static void for_each_four(Results& results, const Body& body) {
#pragma unroll
    for (uint32_t i = 0; i < Shape::kResultVectors; ++i)
      body(i, &results[4 * i / (kProductDims / 2)][4 * i % (kProductDims / 2)]);
  }
  __device__ __forceinline__ float4* thread_state() const {
    return args_.section.state + uint64_t(blockIdx.x) * Shape::kStateVectors +
           threadIdx.x % kWarpgroup;
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
};
#endif

}  // namespace nibble::cuda
