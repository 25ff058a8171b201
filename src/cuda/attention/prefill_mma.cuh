#pragma once
// Attention of rows that share their sequence with others, on the matrix instructions that Ampere
// has and all later devices keep.
//
// A block has a query tile of one KV head, or half of one where shared memory is small. It walks
// over the pages that any of them sees, keys and values of one or two pages in flight. Two warps
// for every 16 queries compute their scores, a half of the page each, exchange the largest scores
// and the weights through shared memory, and then share the result as halves of head_dim, which
// for head_dim 512 is what registers hold. Rows of several sequences in one block are served one
// sequence after the other, with the other rows masked.

#include <cmath>

#include "cuda/attention/heads.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

inline constexpr uint32_t kPageTokens = backend::kKvPageTokens;

// Brings pages of f16.
struct CopyRows {
  // What is in one page, from byte `begin` of the rows on, by all threads; rows from `rows` on
  // become zeros.
  template <int kDim, uint32_t kThreads>
  __device__ static __forceinline__ void load(const KvRows& kv, const KvRow& page, uint32_t begin,
                                              uint32_t rows, uint32_t to) {
    using Page = F16Rows<kDim>;
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < kPageTokens * Page::kChunks; i += kThreads) {
      const uint32_t row = i / Page::kChunks, chunk = i % Page::kChunks;
      const char* const from = page.numbers + row * kv.row_bytes + begin * 2 + chunk * 16;
      ptx::copy_async_16_or_zero(to + Page::chunk_at(row, chunk), row < rows ? from : page.numbers,
                                 row < rows);
    }
  }
};

// Brings pages of compressed rows, and leaves them as f16.
template <class Codec>
struct DecodeRows {
  template <int kDim, uint32_t kThreads>
  __device__ static __forceinline__ void load(const KvRows& kv, const KvRow& page, uint32_t begin,
                                              uint32_t rows, uint32_t to) {
    using Page = F16Rows<kDim>;
    constexpr uint32_t kEightBytes = Codec::kEightWords * 4;
    const uint32_t block_bits = __popc(kv.block - 1);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < kPageTokens * Page::kChunks; i += kThreads) {
      const uint32_t row = i / Page::kChunks, chunk = i % Page::kChunks;
      const uint32_t eight = begin / 8 + chunk;
      __half2 values[4] = {};
      if (row < rows) {
        using Words = AlignedWords<Codec::kEightWords>;
        const Words words = *reinterpret_cast<const Words*>(page.numbers + row * kv.row_bytes +
                                                            eight * kEightBytes);
        Codec::decode(words.word, values);
        const __half scale = page.scales[row * kv.row_scales + (eight * 8 >> block_bits)];
#pragma unroll
        for (__half2& pair : values) pair = __hmul2(pair, __half2half2(scale));
      }
      ptx::store_shared(to + Page::chunk_at(row, chunk), *reinterpret_cast<const uint4*>(values));
    }
  }

 private:
  template <uint32_t kWords>
  struct alignas(4 * kWords) AlignedWords {
    uint32_t word[kWords];
  };
};

// Dynamic shared memory; the results stand where queries, pages and weights were, at the end.
template <int kDim, uint32_t kTileIndex>
struct PrefillMmaShared {
  static constexpr MmaTile kTile = kMmaTiles[kTileIndex];
  static constexpr uint32_t kPageBytes = kPageTokens * 2 * kDim;
  static constexpr uint32_t kKeys = kTile.queries * 2 * kDim;
  static constexpr uint32_t kValues = kKeys + kTile.pages * kPageBytes;
  static constexpr uint32_t kWeights = kValues + kTile.pages * kPageBytes;
  static constexpr uint32_t kWeightStride = kPageTokens * 2 + 16;  // of a query: other banks
  static constexpr uint32_t kLargest = kWeights + kTile.queries * kWeightStride;  // [2][queries]
  static constexpr uint32_t kBytes = kLargest + 2 * kTile.queries * 4;
  static constexpr uint32_t kResultStride = kDim + 4;  // in floats
  static_assert(kBytes == kTile.shared_bytes(kDim));
  static_assert(kTile.queries * kResultStride * 4 <= kLargest);
};

template <class Rows, int kDim, uint32_t kTileIndex>
class PrefillMmaBlock {
  using Shared = PrefillMmaShared<kDim, kTileIndex>;
  using Page = F16Rows<kDim>;
  static constexpr MmaTile kTile = kMmaTiles[kTileIndex];
  static constexpr uint32_t kParts = kTile.queries / 16;
  static constexpr int kDimTiles = kDim / 2 / 8;  // of a warp's half

 public:
  __device__ PrefillMmaBlock(const AttentionKernelArgs& args, char* shared)
      : args_(args),
        tiles_(args.layer.shape),
        shared_(shared),
        shared_address_(ptx::shared_address(shared)),
        lane_(threadIdx.x % kLanes),
        row_part_(threadIdx.x / kLanes % kParts * 16),
        half_(threadIdx.x / kLanes / kParts) {
    const uint32_t part = blockIdx.x / tiles_.kv_heads;
    tile_ = part / (kQueryTile / kTile.queries);
    first_query_ = part % (kQueryTile / kTile.queries) * kTile.queries;
    kv_head_ = blockIdx.x % tiles_.kv_heads;
    first_row_ = args.launch.single_rows + tile_ * tiles_.tile_tokens;
    rows_end_ = min(first_row_ + tiles_.tile_tokens, args.launch.rows);
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
  __device__ void load_queries() {
    constexpr uint32_t kChunks = kTile.queries * 8;  // of 64 dims
    const uint4* const from =
        reinterpret_cast<const uint4*>(args_.queries + tiles_.tile(tile_, kv_head_)) +
        first_query_ * 8;
    for (uint32_t i = threadIdx.x; i < kTile.queries * Page::kChunks; i += blockDim.x)
      ptx::copy_async_16(shared_ + i * 16, from + i / kChunks * (kQueryTile * 8) + i % kChunks);
  }

  // Brings a page's keys or values, which begin at value `begin` of a row.
  __device__ void ask(const Run& run, uint32_t page, uint32_t to, uint64_t layer_offset,
                      uint32_t begin) const {
    if (page < run.pages_end) {
      const KvRows& kv = args_.layer.kv;
      const uint64_t* const table = page_table(args_.step, args_.step.places[run.begin].sequence);
      Rows::template load<kDim, kTile.threads()>(
          kv, page_row(table[page], kv, layer_offset, kv_head_, 0), begin,
          run.stored - page * kPageTokens, to + page % kTile.pages * Shared::kPageBytes);
    }
    ptx::copy_async_commit();
  }
  __device__ void ask_keys(const Run& run, uint32_t page) const {
    ask(run, page, shared_address_ + Shared::kKeys, args_.layer.kv.key_offset, 0);
  }
  __device__ void ask_values(const Run& run, uint32_t page) const {
    const KvRows& kv = args_.layer.kv;
    ask(run, page, shared_address_ + Shared::kValues, kv.value_offset, kv.order.value_begin());
  }

  // Rows row_part + g and + 8 by the 16 keys of this warp's half of the page.
  __device__ void compute_scores(uint32_t page, float (&scores)[2][4]) const {
    const uint32_t query = row_part_ + lane_ % 16;
    const uint32_t query_at = shared_address_ + query * 128;
    const uint32_t query_chunk = lane_ / 16 ^ query % 8;
    const uint32_t key_at = shared_address_ + Shared::kKeys +
                            page % kTile.pages * Shared::kPageBytes + half_ * 16 * Page::kRowBytes +
                            Page::template square_at<false>(lane_);
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t left[4], key[4];
      ptx::load_matrices(
          left, query_at + step / 4 * (kTile.queries * 128) + (query_chunk ^ step % 4 * 2) * 16);
      ptx::load_matrices(key, Page::skip_chunks(key_at, 2 * step));
      ptx::multiply_add(scores[0], left, key[0], key[1]);
      ptx::multiply_add(scores[1], left, key[2], key[3]);
    }
  }

  // Takes off the keys that a row does not see.
  __device__ void mask(const Run& run, uint32_t page, float (&scores)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t row =
          first_row_ + (first_query_ + row_part_ + lane_ / 4 + 8 * i) / tiles_.ratio;
      const Run::Seen seen = run.seen(row, args_.layer.window);
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint32_t key = page * kPageTokens + half_ * 16 + tile * 8 + lane_ % 4 * 2 + j;
          if (!seen.has(key)) scores[tile][2 * i + j] = -INFINITY;
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
      all_largest[half_ * kTile.queries + query + 8 * i] = largest;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t at = query + 8 * i;
      const float next =
          fmaxf(largest_[i], fmaxf(all_largest[at], all_largest[kTile.queries + at]));
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
    const uint32_t value_at = Page::skip_chunks(shared_address_ + Shared::kValues +
                                                    page % kTile.pages * Shared::kPageBytes +
                                                    Page::template square_at<true>(lane_),
                                                half_ * Page::kChunks / 2);
    const uint32_t weight_at = shared_address_ + Shared::kWeights +
                               (row_part_ + lane_ % 16) * Shared::kWeightStride + lane_ / 16 * 16;
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t weights[4];
      ptx::load_matrices(weights, weight_at + step * 32);
      const uint32_t rows_at = value_at + step * 16 * Page::kRowBytes;
#pragma unroll
      for (int tile = 0; tile < kDimTiles; tile += 2) {
        uint32_t value[4];
        ptx::load_matrices_transposed(value, Page::skip_chunks(rows_at, tile));
        ptx::multiply_add(results_[tile], weights, value[0], value[1]);
        ptx::multiply_add(results_[tile + 1], weights, value[2], value[3]);
      }
    }
  }

  __device__ void attend(const Run& run) {
    __syncthreads();  // the run before is done with the pages
    ask_keys(run, run.first_page);
    ask_values(run, run.first_page);
    if (kTile.pages == 2) ask_keys(run, run.first_page + 1);
    for (uint32_t page = run.first_page; page < run.pages_end; ++page) {
      ptx::copy_async_wait<kTile.pages>();  // this page's keys
      __syncthreads();
      float scores[2][4] = {};
      compute_scores(page, scores);
      mask(run, page, scores);
      weigh(scores);  // after its barrier all have read these keys and the values before
      if (kTile.pages == 2) ask_values(run, page + 1);
      ask_keys(run, page + kTile.pages);
      ptx::copy_async_wait<2 * kTile.pages - 1>();  // this page's values
      __syncthreads();
      add_values(page);
      if (kTile.pages == 1) {
        __syncthreads();
        ask_values(run, page + 1);
      }
    }
  }

  __device__ void write_results() {
    float* const all_sums = reinterpret_cast<float*>(shared_ + Shared::kLargest);
    float* const results = reinterpret_cast<float*>(shared_);
    const uint32_t query = row_part_ + lane_ / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      sums_[i] += __shfl_xor_sync(kAllLanes, sums_[i], 1);
      sums_[i] += __shfl_xor_sync(kAllLanes, sums_[i], 2);
    }
    __syncthreads();
    const uint32_t first_dim = half_ * kDim / 2 + lane_ % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      all_sums[half_ * kTile.queries + query + 8 * i] = sums_[i];
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile)
        *reinterpret_cast<float2*>(results + (query + 8 * i) * Shared::kResultStride + first_dim +
                                   8 * tile) = {results_[tile][2 * i], results_[tile][2 * i + 1]};
    }
    __syncthreads();
    constexpr uint32_t kEights = kDim / 8;
    for (uint32_t i = threadIdx.x; i < kTile.queries * kEights; i += blockDim.x) {
      const uint32_t q = i / kEights, dim = i % kEights * 8;
      const uint32_t row = first_row_ + (first_query_ + q) / tiles_.ratio;
      if (row >= rows_end_) break;
      const float scale = 1.0f / (all_sums[q] + all_sums[kTile.queries + q]);
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = results[q * Shared::kResultStride + dim + j] * scale;
      store_result(args_, tiles_, tile_, kv_head_, first_query_ + q, dim, values);
    }
  }

  const AttentionKernelArgs& args_;
  const QueryTiles tiles_;
  char* shared_;
  uint32_t shared_address_, lane_;
  uint32_t row_part_;  // first of this warp's 16 queries
  uint32_t half_;      // of the page's keys, then of head_dim
  uint32_t kv_head_;
  uint32_t tile_, first_query_;    // in it
  uint32_t first_row_, rows_end_;  // the tile's

  // A warp's results and softmax. Lane 4 g + t has the queries g and g + 8, columns 2t and 2t + 1.
  float results_[kDimTiles][4] = {};
  float largest_[2] = {-INFINITY, -INFINITY};
  float sums_[2] = {};  // over this lane's keys
};

template <class Rows, int kDim, uint32_t kTileIndex>
__global__ void __launch_bounds__(kMmaTiles[kTileIndex].threads(), 1)
    prefill_mma(const __grid_constant__ AttentionKernelArgs args) {
  extern __shared__ __align__(128) char shared[];
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  PrefillMmaBlock<Rows, kDim, kTileIndex>(args, shared).run();
}

template <class Rows, int kDim, uint32_t kTileIndex>
void launch_prefill_mma(cudaStream_t stream, const AttentionKernelArgs& args) {
  constexpr MmaTile kTile = kMmaTiles[kTileIndex];
  constexpr uint32_t kBytes = PrefillMmaShared<kDim, kTileIndex>::kBytes;
  const auto kernel = prefill_mma<Rows, kDim, kTileIndex>;
  NIBBLE_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kBytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t rows = args.launch.rows - args.launch.single_rows;
  const uint32_t tokens = query_tile_tokens(shape);
  const uint32_t parts = (rows + tokens - 1) / tokens * (kQueryTile / kTile.queries);
  launch_dependent(stream, kernel, parts * shape.kv_heads, kTile.threads(), kBytes, args);
}

}  // namespace nibble::cuda
