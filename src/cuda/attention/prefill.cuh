#pragma once
// Attention of rows that share their sequence with others, over pages that hold all keys.
//
// A block has one KV head and 64 queries: its query heads of consecutive rows. It walks over the
// pages that any of them sees, keys and values of two pages in flight. Eight warps compute the
// scores of 64 x 32 as 4 x 2 parts, exchange the largest scores and the weights through shared
// memory, and then share the result as 4 x 2 parts of rows and head_dim halves, which for head_dim
// 512 is what registers hold. Rows of several sequences in one block are served one sequence after
// the other, with the other rows masked.

#include <cmath>

#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/layouts/activations.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

inline constexpr uint32_t kPrefillWarps = 8;
inline constexpr uint32_t kPageTokens = backend::kKvPageTokens;
static_assert(kQueryTile == 64 && kPageTokens == 32);

// Dynamic shared memory; the results stand where queries and pages were, at the end.
template <class Kv>
struct PrefillShared {
  static constexpr uint32_t kPageBytes = kPageTokens * Kv::kRowBytes;
  static constexpr uint32_t kKeys = kQueryTile * Kv::kRowBytes;  // two pages
  static constexpr uint32_t kValues = kKeys + 2 * kPageBytes;    // two pages
  static constexpr uint32_t kWeights = kValues + 2 * kPageBytes;
  static constexpr uint32_t kWeightStride = kPageTokens * 2 + 16;  // of a query: other banks
  static constexpr uint32_t kLargest = kWeights + kQueryTile * kWeightStride;  // [2][kQueryTile]
  static constexpr uint32_t kBytes = kLargest + 2 * kQueryTile * 4;
  static constexpr uint32_t kResultStride = Kv::kHeadDim + 4;  // in floats
  static_assert(kQueryTile * kResultStride * 4 <= kWeights);
};

// Rows of one sequence among a block's, and the keys they see.
struct Run {
  uint32_t begin, end;      // rows of the step
  uint32_t first_position;  // of row `begin`
  uint32_t stored;          // positions of the sequence that have keys
  uint32_t first_page, pages_end;

  __device__ Run(const AttentionKernelArgs& args, uint32_t begin, uint32_t rows_end)
      : begin(begin), end(begin + 1) {
    const RowPlace place = args.step.places[begin];
    while (end < rows_end && args.step.places[end].sequence == place.sequence) ++end;
    first_position = place.position;
    stored = args.step.places[end - 1].position + 1;
    const VisibleKeys keys(first_position, args.layer.window);
    first_page = keys.first / kPageTokens;
    pages_end = (stored + kPageTokens - 1) / kPageTokens;
  }
};

template <class Kv>
class PrefillBlock {
  using Shared = PrefillShared<Kv>;
  static constexpr int kDimTiles = Kv::kHeadDim / 2 / 8;  // of a warp's half

 public:
  __device__ PrefillBlock(const AttentionKernelArgs& args, char* shared)
      : args_(args),
        shared_(shared),
        shared_address_(ptx::shared_address(shared)),
        lane_(threadIdx.x % kLanes),
        row_part_(threadIdx.x / kLanes % 4 * 16),
        half_(threadIdx.x / kLanes / 4) {
    const backend::AttentionShape& shape = args.layer.shape;
    ratio_ = shape.query_heads / shape.kv_heads;
    kv_head_ = blockIdx.x % shape.kv_heads;
    const uint32_t rows_per_block = kQueryTile / ratio_;
    first_row_ = args.launch.single_rows + blockIdx.x / shape.kv_heads * rows_per_block;
    rows_end_ = min(first_row_ + rows_per_block, args.launch.rows);
  }

  __device__ void run() {
    load_queries();
    for (uint32_t begin = first_row_; begin < rows_end_;) {
      const Run run(args_, begin, rows_end_);
      attend(run);
      begin = run.end;
    }
    ptx::copy_async_wait<0>();
    write_results();
  }

 private:
  __device__ uint32_t queries() const { return (rows_end_ - first_row_) * ratio_; }

  __device__ void load_queries() {
    const uint64_t row_bytes = uint64_t(args_.layer.shape.query_heads) * Kv::kRowBytes;
    const char* const from = reinterpret_cast<const char*>(args_.queries) +
                             (first_row_ - args_.launch.single_rows) * row_bytes +
                             uint64_t(kv_head_) * ratio_ * Kv::kRowBytes;
    for (uint32_t i = threadIdx.x; i < kQueryTile * Kv::kChunks; i += blockDim.x) {
      const uint32_t query = i / Kv::kChunks, chunk = i % Kv::kChunks;
      const bool exists = query < queries();
      const char* const row = from + query / ratio_ * row_bytes + query % ratio_ * Kv::kRowBytes;
      ptx::copy_async_16_or_zero(shared_address_ + Kv::chunk_at(query, chunk),
                                 exists ? row + chunk * 16 : from, exists);
    }
  }

  // Brings a page's keys or values; rows that hold none become zeros.
  __device__ void ask(const Run& run, uint32_t page, uint32_t to, uint64_t layer_offset) const {
    if (page < run.pages_end) {
      const uint64_t* const table = page_table(args_.step, args_.step.places[run.begin].sequence);
      const char* const from = page_row(table[page], layer_offset, kv_head_, 0, Kv::kRowBytes);
      const uint32_t rows = run.stored - page * kPageTokens;
#pragma unroll 4
      for (uint32_t i = threadIdx.x; i < kPageTokens * Kv::kChunks; i += kPrefillWarps * kLanes) {
        const uint32_t row = i / Kv::kChunks, chunk = i % Kv::kChunks;
        ptx::copy_async_16_or_zero(to + page % 2 * Shared::kPageBytes + Kv::chunk_at(row, chunk),
                                   row < rows ? from + i * 16 : from, row < rows);
      }
    }
    ptx::copy_async_commit();
  }
  __device__ void ask_keys(const Run& run, uint32_t page) const {
    ask(run, page, shared_address_ + Shared::kKeys, args_.layer.key_offset);
  }
  __device__ void ask_values(const Run& run, uint32_t page) const {
    ask(run, page, shared_address_ + Shared::kValues, args_.layer.value_offset);
  }

  // Rows row_part + g and + 8 by the 16 keys of this warp's half of the page.
  __device__ void compute_scores(uint32_t page, float (&scores)[2][4]) const {
    const uint32_t query_at =
        shared_address_ + row_part_ * Kv::kRowBytes + Kv::template square_at<true>(lane_);
    const uint32_t key_at = shared_address_ + Shared::kKeys + page % 2 * Shared::kPageBytes +
                            half_ * 16 * Kv::kRowBytes + Kv::template square_at<false>(lane_);
#pragma unroll
    for (int step = 0; step < Kv::kHeadDim / 16; ++step) {
      uint32_t query[4], key[4];
      ptx::load_matrices(query, Kv::skip_chunks(query_at, 2 * step));
      ptx::load_matrices(key, Kv::skip_chunks(key_at, 2 * step));
      ptx::multiply_add(scores[0], query, key[0], key[1]);
      ptx::multiply_add(scores[1], query, key[2], key[3]);
    }
  }

  // Takes off the keys that a row does not see.
  __device__ void mask(const Run& run, uint32_t page, float (&scores)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = first_row_ + (row_part_ + lane_ / 4 + 8 * i) / ratio_;
      const bool in_run = row >= run.begin && row < run.end;
      const uint32_t position = run.first_position + (row - run.begin);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t key = page * kPageTokens + half_ * 16 + tile * 8 + lane_ % 4 * 2 + j;
          const bool sees = in_run && key <= position &&
                            (args_.layer.window == 0 || position - key < args_.layer.window);
          if (!sees) scores[tile][2 * i + j] = -INFINITY;
        }
      }
    }
  }

  // Leaves the page's weights in shared memory and the results ready to be added to.
  __device__ void weigh(const float (&scores)[2][4]) {
    float* const all_largest = reinterpret_cast<float*>(shared_ + Shared::kLargest);
    const uint32_t query = row_part_ + lane_ / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float largest = fmaxf(fmaxf(scores[0][2 * i], scores[0][2 * i + 1]),
                            fmaxf(scores[1][2 * i], scores[1][2 * i + 1]));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, 2));
      all_largest[half_ * kQueryTile + query + 8 * i] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = query + 8 * i;
      const float next = fmaxf(largest_[i], fmaxf(all_largest[at], all_largest[kQueryTile + at]));
      const float base = next == -INFINITY ? 0.0f : next;  // a row that has seen nothing yet
      const float shrink = exp2f(largest_[i] - base);
      largest_[i] = next;
      sums_[i] *= shrink;
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
        results_[tile][2 * i] *= shrink;
        results_[tile][2 * i + 1] *= shrink;
      }
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const __half2 weights = __floats2half2_rn(exp2f(scores[tile][2 * i] - base),
                                                  exp2f(scores[tile][2 * i + 1] - base));
        sums_[i] += __low2float(weights) + __high2float(weights);
        const uint32_t column = half_ * 16 + tile * 8 + lane_ % 4 * 2;
        *reinterpret_cast<__half2*>(shared_ + Shared::kWeights + at * Shared::kWeightStride +
                                    column * 2) = weights;
      }
    }
  }

  __device__ void add_values(uint32_t page) {
    const uint32_t value_at =
        Kv::skip_chunks(shared_address_ + Shared::kValues + page % 2 * Shared::kPageBytes +
                            Kv::template square_at<true>(lane_),
                        half_ * Kv::kChunks / 2);
    const uint32_t weight_at = shared_address_ + Shared::kWeights +
                               (row_part_ + lane_ % 16) * Shared::kWeightStride + lane_ / 16 * 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t weights[4];
      ptx::load_matrices(weights, weight_at + step * 32);
      const uint32_t rows_at = value_at + step * 16 * Kv::kRowBytes;
#pragma unroll
      for (int tile = 0; tile < kDimTiles; tile += 2) {
        uint32_t value[4];
        ptx::load_matrices_transposed(value, Kv::skip_chunks(rows_at, tile));
        ptx::multiply_add(results_[tile], weights, value[0], value[1]);
        ptx::multiply_add(results_[tile + 1], weights, value[2], value[3]);
      }
    }
  }

  __device__ void attend(const Run& run) {
    __syncthreads();  // the run before is done with the pages
    ask_keys(run, run.first_page);
    ask_values(run, run.first_page);
    ask_keys(run, run.first_page + 1);
    for (uint32_t page = run.first_page; page < run.pages_end; ++page) {
      ptx::copy_async_wait<2>();  // this page's keys
      __syncthreads();
      float scores[2][4] = {};
      compute_scores(page, scores);
      mask(run, page, scores);
      weigh(scores);  // after its barrier all have read these keys and the values before
      ask_values(run, page + 1);
      ask_keys(run, page + 2);
      ptx::copy_async_wait<3>();  // this page's values
      __syncthreads();
      add_values(page);
    }
  }

  __device__ void write_results() {
    using Shared = PrefillShared<Kv>;
    float* const all_sums = reinterpret_cast<float*>(shared_ + Shared::kLargest);
    float* const results = reinterpret_cast<float*>(shared_);
    const uint32_t query = row_part_ + lane_ / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums_[i] += __shfl_xor_sync(kAllLanes, sums_[i], 1);
      sums_[i] += __shfl_xor_sync(kAllLanes, sums_[i], 2);
    }
    __syncthreads();
    const uint32_t first_dim = half_ * Kv::kHeadDim / 2 + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      all_sums[half_ * kQueryTile + query + 8 * i] = sums_[i];
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile)
        *reinterpret_cast<float2*>(results + (query + 8 * i) * Shared::kResultStride + first_dim +
                                   8 * tile) = {results_[tile][2 * i], results_[tile][2 * i + 1]};
    }
    __syncthreads();
    constexpr uint32_t kEights = Kv::kHeadDim / 8;
    for (uint32_t i = threadIdx.x; i < queries() * kEights; i += blockDim.x) {
      const uint32_t q = i / kEights, dim = i % kEights * 8;
      const float scale = 1.0f / (all_sums[q] + all_sums[kQueryTile + q]);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = results[q * Shared::kResultStride + dim + j] * scale;
      const uint32_t head = kv_head_ * ratio_ + q % ratio_;
      store_activations(args_.step.output, first_row_ + q / ratio_, head * Kv::kHeadDim + dim,
                        values);
    }
  }

  const AttentionKernelArgs& args_;
  char* shared_;
  uint32_t shared_address_, lane_;
  uint32_t row_part_;  // first of this warp's 16 queries
  uint32_t half_;      // of the page's keys, then of head_dim
  uint32_t ratio_, kv_head_, first_row_, rows_end_;

  // A warp's results and softmax. Lane 4 g + t has the queries g and g + 8, columns 2t and 2t + 1.
  float results_[kDimTiles][4] = {};
  float largest_[2] = {-INFINITY, -INFINITY};
  float sums_[2] = {};  // over this lane's keys
};

template <class Kv>
__global__ void __launch_bounds__(kPrefillWarps* kLanes, 1)
    prefill_kernel(const __grid_constant__ AttentionKernelArgs args) {
  extern __shared__ __align__(128) char shared[];
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  PrefillBlock<Kv>(args, shared).run();
}

template <class Kv>
void launch_prefill(cudaStream_t stream, const AttentionKernelArgs& args) {
  constexpr uint32_t kBytes = PrefillShared<Kv>::kBytes;
  NIBBLE_CUDA(cudaFuncSetAttribute(prefill_kernel<Kv>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(kBytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t rows = args.launch.rows - args.launch.single_rows;
  const uint32_t rows_per_block = kQueryTile / (shape.query_heads / shape.kv_heads);
  launch_dependent(stream, prefill_kernel<Kv>,
                   (rows + rows_per_block - 1) / rows_per_block * shape.kv_heads,
                   kPrefillWarps * kLanes, kBytes, args);
}

}  // namespace nibble::cuda
