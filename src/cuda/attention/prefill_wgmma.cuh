#pragma once
// Attention of rows that share their sequence with others, on Hopper's asynchronous matrix
// instructions.
//
// Two blocks, a cluster, take one KV head and consecutive query tiles of it: their keys and values
// are the same, and each block brings half of them for both, because 64 queries a multiprocessor
// would else want 64 bytes a clock from the L2 cache, which gives 24. A block walks over tiles of
// 128 keys, which a warpgroup of loaders brings by the copy engine, two rings of slots. Two shapes:
//
// Two query tiles, a warpgroup for each, which multiplies 64 queries by 128 keys, takes powers, and
// multiplies the values by these weights in its registers; the tensor cores work for one while the
// other takes powers.
//
// For head_dim 512, whose results fill the registers of two warpgroups, one query tile: a scorer
// leaves the weights in shared memory, and two warpgroups multiply the values, half of head_dim
// each. The scorer hands weights over one step late, when it has the next step's scores: so the
// tensor cores multiply values while it takes powers.

#include "cuda/attention/prefill_wgmma_block.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

#if NIBBLE_HAS_WGMMA
template <class Kv>
class TwoTilesBlock : public PrefillWgmmaBlock<Kv> {
  using Base = PrefillWgmmaBlock<Kv>;
  using typename Base::Place, typename Base::Results, typename Base::Scores, typename Base::Shape;

 public:
  using Base::Base;

  __device__ __forceinline__ void consume(uint32_t index) {
    ptx::take_registers<232>();
    Softmax softmax;
    Results results = {};
    this->load_softmax(index, softmax);
    this->load_results(index, results);
    Place keys, values;
    ptx::barrier_wait(this->queries_full_, 0);
    this->for_each_key_tile([&](const Run& run, uint32_t first_key) {
      if (!sees_any(run, index, first_key)) {
        this->skip_slots(this->keys_full_, this->keys_free_, keys);
        this->skip_slots(this->values_full_, this->values_free_, values);
        return;
      }
      Scores scores;
      this->multiply_keys(index, keys, scores);
      this->mask(run, index, first_key, scores);
      float factors[2];
      if (softmax.weigh(scores, factors)) this->scale(factors, results);
      __half2 weights[kKeysPerTile / 16][4];  // as left operands
#pragma unroll
      for (uint32_t i = 0; i < kKeysPerTile / 4; ++i)
        weights[i / 4][i % 4] = __floats2half2_rn(scores[2 * i], scores[2 * i + 1]);
      const uint32_t stored = run.stored > first_key ? run.stored - first_key : 0;
      this->multiply_values(
          index, 0, stored, values, [&](uint32_t slot, uint32_t step, uint32_t j, uint64_t right) {
            ptx::wgmma<Base::kProductDims, true>(
                results[j], weights[slot * (Kv::kValueSlotKeys / 16) + step], right);
          });
    });
    if (!this->args_.section.is_last) {
      this->leave_softmax(index, softmax);
      this->leave_results(index, results);
      return;
    }
    float factors[2];
    softmax.end(factors);
    this->scale(factors, results);
    this->write_results(index, 0, results);
  }

 private:
  // Whether a row of the query tile `index` sees one of the tile's keys.
  __device__ __forceinline__ bool sees_any(const Run& run, uint32_t index,
                                           uint32_t first_key) const {
    const uint32_t tile = this->tile_row(index);
    const uint32_t begin = max(tile, run.begin);
    const uint32_t end = min(tile + this->tiles_.tile_tokens, run.end);
    const uint32_t window = this->args_.layer.window;
    return begin < end && run.seen(end - 1, window).end > first_key &&
           run.seen(begin, window).begin < first_key + kKeysPerTile;
  }
};

template <class Kv>
class OneTileBlock : public PrefillWgmmaBlock<Kv> {
  using Base = PrefillWgmmaBlock<Kv>;
  using typename Base::Place, typename Base::Results, typename Base::Scores, typename Base::Shape;

 public:
  __device__ __forceinline__ OneTileBlock(const AttentionKernelArgs& args, char* shared)
      : Base(args, shared),
        factors_(reinterpret_cast<WeightFactors*>(shared + Shape::kFactorsAt)) {}

  __device__ __forceinline__ void consume(uint32_t index) {
    if (index == 0) {
      ptx::take_registers<136>();
      score();
    } else {
      ptx::take_registers<168>();
      attend(index - 1);
    }
  }

 private:
  __device__ __forceinline__ void score() {
    Softmax softmax;
    this->load_softmax(0, softmax);
    Place place;
    uint32_t step = 0;
    ptx::barrier_wait(this->queries_full_, 0);
    this->for_each_key_tile([&](const Run& run, uint32_t first_key) {
      Scores scores;
      this->multiply_keys(0, place, scores);
      if (step > 0) hand_over(step - 1);
      this->mask(run, 0, first_key, scores);
      float factors[2];
      const bool any = softmax.weigh(scores, factors);
      wait_for_buffer(step);
      leave_factors(step, factors);
      if (this->lane_ == 0) factors_[step % 2].any[this->warp_] = any;
      store_weights(step % 2, scores);
      ++step;
    });
    if (step > 0) hand_over(step - 1);
    if (!this->args_.section.is_last) return this->leave_softmax(0, softmax);
    // In place of further weights: what ends the results.
    float factors[2];
    softmax.end(factors);
    wait_for_buffer(step);
    leave_factors(step, factors);
    __syncwarp();
    hand_over(step);
  }

  // `index`: which half of the columns.
  __device__ __forceinline__ void attend(uint32_t index) {
    Results results = {};
    this->load_results(index, results);
    Place place;
    uint32_t step = 0;
    this->for_each_key_tile([&](const Run& run, uint32_t first_key) {
      wait_for_weights(step);
      if (factors_[step % 2].any[this->warp_]) scale(step, results);
      const uint32_t stored = run.stored > first_key ? run.stored - first_key : 0;
      this->multiply_values(
          index, index * Shape::kValueDims, stored, place,
          [&](uint32_t slot, uint32_t i, uint32_t j, uint64_t right) {
            const uint32_t key = slot * Kv::kValueSlotKeys + 16 * i;
            const uint64_t left =
                ptx::matrix_descriptor(weights(step % 2) + key / 64 * Shape::kBlockBytes) +
                key % 64 / 16 * ptx::kDescriptorStep;
            ptx::wgmma_shared<Base::kProductDims, true>(results[j], left, right, true);
          });
      ptx::barrier_arrive(&this->weights_free_[step % 2]);
      ++step;
    });
    if (!this->args_.section.is_last) return this->leave_results(index, results);
    wait_for_weights(step);
    scale(step, results);
    this->write_results(0, index * Shape::kValueDims, results);
  }

  __device__ __forceinline__ void wait_for_buffer(uint32_t step) const {
    ptx::barrier_wait(&this->weights_free_[step % 2], step / 2 % 2 ^ 1);
  }
  __device__ __forceinline__ void wait_for_weights(uint32_t step) const {
    ptx::barrier_wait(&this->weights_full_[step % 2], step / 2 % 2);
  }
  // Of a step, written and published before.
  __device__ __forceinline__ void hand_over(uint32_t step) const {
    if (this->lane_ % 4 == 0) ptx::barrier_arrive(&this->weights_full_[step % 2]);
  }

  __device__ __forceinline__ uint32_t query(uint32_t i) const {
    return this->warp_ * 16 + this->lane_ / 4 + 8 * i;
  }
  __device__ __forceinline__ void leave_factors(uint32_t step, const float (&factors)[2]) const {
    if (this->lane_ % 4 != 0) return;
    for (uint32_t i = 0; i < 2; ++i) factors_[step % 2].of_query[query(i)] = factors[i];
  }
  __device__ __forceinline__ void scale(uint32_t step, Results& results) const {
    const float* const factors = factors_[step % 2].of_query;
    const float own[] = {factors[query(0)], factors[query(1)]};
    Base::scale(own, results);
  }

  __device__ __forceinline__ char* weights(uint32_t buffer) const {
    return this->shared_ + Shape::kWeightsAt + buffer * Shape::kWeightBytes;
  }

  // As left operand: two blocks of 64 queries by 64 keys.
  __device__ __forceinline__ void store_weights(uint32_t buffer, const Scores& scores) const {
    const uint32_t query = this->warp_ * 16 + this->lane_ % 16;
    const uint32_t row = ptx::shared_address(weights(buffer)) + query * 128;
#pragma unroll
    for (uint32_t j = 0; j < kKeysPerTile / 8; j += 2) {
      uint32_t matrices[4];
#pragma unroll
      for (uint32_t k = 0; k < 4; ++k) {
        const float* const pair = &scores[4 * j + 2 * k];
        matrices[k] = ptx::as_bits(__floats2half2_rn(pair[0], pair[1]));
      }
      const uint32_t chunk = j + this->lane_ / 16;
      ptx::store_matrices(row + j / 8 * Shape::kBlockBytes + (chunk ^ query) % 8 * 16, matrices);
    }
    ptx::publish_shared_writes();
    __syncwarp();
  }

  WeightFactors* const factors_;
};

template <class Kv>
using PrefillBlock = std::conditional_t<PrefillWgmmaShape<Kv>::kQueryTiles == 1, OneTileBlock<Kv>,
                                        TwoTilesBlock<Kv>>;
#define NIBBLE_CLUSTER __cluster_dims__(kClusterBlocks, 1, 1)
#else
#define NIBBLE_CLUSTER
#endif

template <class Kv>
__global__ void __launch_bounds__(PrefillWgmmaShape<Kv>::kThreads, 1) NIBBLE_CLUSTER
    prefill_wgmma(const __grid_constant__ AttentionKernelArgs args,
                  const __grid_constant__ CUtensorMap map) {
#if NIBBLE_HAS_WGMMA
  extern __shared__ __align__(1024) char shared[];
  PrefillBlock<Kv> block(args, shared);
  if (threadIdx.x == 0) block.init_barriers();
  ptx::launch_dependents();
  if (args.section.pages > 0) ptx::wait_for_dependencies();  // for the state
  ptx::cluster_sync();
  const uint32_t warpgroup = threadIdx.x / kWarpgroup;
  if (warpgroup + 1 < PrefillWgmmaShape<Kv>::kThreads / kWarpgroup) {
    block.consume(warpgroup);
  } else {
    ptx::give_up_registers<40>();
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
  using Shape = PrefillWgmmaShape<Kv>;
  const auto kernel = prefill_wgmma<Kv>;
  NIBBLE_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(Shape::kBytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t rows = args.launch.rows - args.launch.single_rows;
  const uint32_t cluster_rows = kClusterBlocks * Shape::kQueryTiles * query_tile_tokens(shape);
  const uint32_t clusters = (rows + cluster_rows - 1) / cluster_rows * shape.kv_heads;
  launch_dependent(stream, kernel, clusters * kClusterBlocks, Shape::kThreads, Shape::kBytes, args,
                   Kv::map(args.layer.kv));
}

}  // namespace nibble::cuda
