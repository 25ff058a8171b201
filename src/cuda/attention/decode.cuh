#pragma once
// Attention of single rows, norms, RoPE and storing included.
//
// A block has one row, one KV head with up to 8 of its query heads, and a share of the keys that
// the row sees. Its warps work by themselves, each on every kWarps-th tile of 16 keys: they keep a
// tile of keys and one of values in flight, asked for before the wait for the kernel in front,
// since only the row's own key depends on that. Scores are a transposed product, keys x queries, so
// that eight query heads fill the columns of a matrix instruction and each key is read from shared
// memory once; so are the results, head_dim x queries. Softmax is online, per warp; the warps'
// results meet at the end, then the blocks' (merge.cuh).

#include <cmath>

#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/merge.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

// Warps of a block: as many as have room for their tiles in shared memory.
template <class Kv>
inline constexpr uint32_t kDecodeWarps = Kv::kHeadDim <= 256 ? 8 : 6;

// Splits that a lane merges at a time. The largest heads come with the fewest KV heads and so with
// the most splits.
template <class Kv>
inline constexpr uint32_t kMergeBatch = Kv::kHeadDim <= 256 ? 2 : 9;

// Dynamic shared memory: per warp a tile of keys and one of values, where its results stand at the
// end; then the queries, the row's own key and value, the warps' statistics, and RoPE's turns.
template <class Kv>
struct DecodeShared {
  static constexpr uint32_t kWarps = kDecodeWarps<Kv>;
  static constexpr uint32_t kTileBytes = kKeyTile * Kv::kRowBytes;
  static constexpr uint32_t kResultStride = Kv::kHeadDim + 4;  // of a query, in floats
  static_assert(kQueryColumns * kResultStride * 4 <= 2 * kTileBytes);

  static constexpr uint32_t kQueries = kWarps * 2 * kTileBytes;
  static constexpr uint32_t kOwnKey = kQueries + kQueryColumns * Kv::kRowBytes;
  static constexpr uint32_t kOwnValue = kOwnKey + Kv::kRowBytes;
  static constexpr uint32_t kLargest = kOwnValue + Kv::kRowBytes;
  static constexpr uint32_t kSums = kLargest + kWarps * kQueryColumns * 4;
  static constexpr uint32_t kTurns = kSums + kWarps * kQueryColumns * 4;
  static constexpr uint32_t kBytes = kTurns + Kv::kHeadDim / 2 * 8;

  using Turns = float2[Kv::kHeadDim / 2];
  __device__ static Turns& turns(char* shared) {
    return *reinterpret_cast<Turns*>(shared + kTurns);
  }
};

// Which part of the work a block has. The grid is [splits, KV heads x groups of their queries,
// rows].
struct DecodeBlock {
  uint32_t row, kv_head, first_query, queries, split;
  bool leads_kv_head;  // has the first of its queries
  uint32_t index;      // among the blocks of this split

  __device__ explicit DecodeBlock(const backend::AttentionShape& shape)
      : row(blockIdx.z), split(blockIdx.x), index(blockIdx.z * gridDim.y + blockIdx.y) {
    const uint32_t ratio = shape.query_heads / shape.kv_heads;
    const uint32_t groups = gridDim.y / shape.kv_heads;
    kv_head = blockIdx.y / groups;
    const uint32_t group = blockIdx.y % groups;
    first_query = kv_head * ratio + group * kQueryColumns;
    queries = min(ratio - group * kQueryColumns, kQueryColumns);
    leads_kv_head = group == 0;
  }
};

// Brings tiles of one KV head to shared memory.
template <class Kv>
class TileReader {
 public:
  __device__ TileReader(const AttentionKernelArgs& args, uint32_t kv_head, RowPlace place,
                        VisibleKeys keys, uint32_t lane)
      : table_(page_table(args.step, place.sequence)),
        kv_head_(kv_head),
        position_(place.position),
        first_(keys.first),
        lane_(lane) {}

  // Looks up the pages of a tile, so that their addresses are there when it is asked for.
  __device__ void look_up(uint32_t tile) {
    const uint32_t begin = first_ + tile * kKeyTile;
    pages_[0] = table_[begin / backend::kKvPageTokens];
    pages_[1] = table_[min(begin + kKeyTile - 1, position_) / backend::kKvPageTokens];
  }

  // Copies the tile's rows before the row's own position; zeros for the rest.
  __device__ void ask(uint32_t to, uint64_t layer_offset, uint32_t tile) const {
    const uint32_t begin = first_ + tile * kKeyTile;
    const uint32_t stored = position_ - begin;
    const uint32_t in_first_page =
        backend::kKvPageTokens - begin % backend::kKvPageTokens;  // rows before the second page
    const char* const first_page =
        page_row(pages_[0], layer_offset, kv_head_, begin, Kv::kRowBytes);
    const char* const second_page = page_row(pages_[1], layer_offset, kv_head_, 0, Kv::kRowBytes) -
                                    uint64_t(in_first_page) * Kv::kRowBytes;
#pragma unroll 4  // code that runs once is slower to fetch than to run
    for (uint32_t i = 0; i < kKeyTile * Kv::kChunks / kLanes; ++i) {
      const uint32_t row = (i * kLanes + lane_) / Kv::kChunks;
      const uint32_t chunk = (i * kLanes + lane_) % Kv::kChunks;
      const char* const page = row < in_first_page ? first_page : second_page;
      const bool copy = row < stored;
      ptx::copy_async_16_or_zero(to + Kv::chunk_at(row, chunk),
                                 copy ? page + row * Kv::kRowBytes + chunk * 16 : first_page, copy);
    }
  }

 private:
  const uint64_t* table_;
  uint32_t kv_head_, position_, first_, lane_;
  uint64_t pages_[2];
};

// A warp's running softmax over its tiles. Lane 4 g + t has the queries 2t and 2t + 1.
template <class Kv>
struct DecodeState {
  static constexpr int kDimTiles = Kv::kHeadDim / 16;
  float results[kDimTiles][4];  // [dims g and g + 8][queries]
  float largest[2];
  float sums[2];  // of the keys g and g + 8 alone

  __device__ DecodeState() : results{}, largest{-INFINITY, -INFINITY}, sums{} {}

  // Scores of 16 keys, transposed.
  __device__ static void scores(uint32_t keys, uint32_t queries, uint32_t lane,
                                float (&scores)[4]) {
    const uint32_t key_at = keys + Kv::template square_at<true>(lane);
    const uint32_t query_at = queries + Kv::chunk_at(lane % 8, lane / 8);
    float chains[4][4] = {};  // independent sums: the instruction's latency is long
#pragma unroll 2              // as above
    for (int line = 0; line < kDimTiles / 4; ++line) {
#pragma unroll
      for (int step = 0; step < 4; step += 2) {
        uint32_t query[4], key[4];
        ptx::load_matrices(query, Kv::skip_chunks(query_at + line * 128, 2 * step));
        ptx::load_matrices(key, Kv::skip_chunks(key_at + line * 128, 2 * step));
        ptx::multiply_add(chains[step], key, query[0], query[1]);
        ptx::load_matrices(key, Kv::skip_chunks(key_at + line * 128, 2 * step + 2));
        ptx::multiply_add(chains[step + 1], key, query[2], query[3]);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scores[i] = (chains[0][i] + chains[1][i]) + (chains[2][i] + chains[3][i]);
  }

  // Scores to weights, as the second operand of the product with the values.
  __device__ void weigh(const float (&scores)[4], uint32_t (&weights)[2]) {
    float next[2], shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      next[i] = fmaxf(scores[i], scores[i + 2]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        next[i] = fmaxf(next[i], __shfl_xor_sync(kAllLanes, next[i], step));
      next[i] = fmaxf(next[i], largest[i]);
      shrink[i] = exp2f(largest[i] - next[i]);
    }
    if (__any_sync(kAllLanes, next[0] != largest[0] || next[1] != largest[1])) {
#pragma unroll
      for (int tile = 0; tile < kDimTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) results[tile][i] *= shrink[i % 2];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half2 rounded = __floats2half2_rn(exp2f(scores[2 * half] - next[0]),
                                                exp2f(scores[2 * half + 1] - next[1]));
      sums[0] = (half ? sums[0] : sums[0] * shrink[0]) + __low2float(rounded);
      sums[1] = (half ? sums[1] : sums[1] * shrink[1]) + __high2float(rounded);
      weights[half] = ptx::transpose_matrix(ptx::as_bits(rounded));
    }
    largest[0] = next[0];
    largest[1] = next[1];
  }

  __device__ void add_values(uint32_t values, uint32_t lane, const uint32_t (&weights)[2]) {
    const uint32_t value_at = values + Kv::template square_at<false>(lane);
#pragma unroll
    for (int tile = 0; tile < kDimTiles; ++tile) {
      uint32_t value[4];
      ptx::load_matrices_transposed(value, Kv::skip_chunks(value_at, 2 * tile));
      ptx::multiply_add(results[tile], value, weights[0], weights[1]);
    }
  }
};

// Prepares kCount of the block's heads, every kDecodeWarps-th from `first` on: their loads are
// under way together. Heads are numbered queries, key, value. Waits for the kernel in front.
template <class Kv, uint32_t kCount>
__device__ void prepare_warp_heads(const AttentionKernelArgs& args, const DecodeBlock& block,
                                   RowPlace place, uint32_t first, char* shared) {
  using Shared = DecodeShared<Kv>;
  using Head = WarpHead<Kv::kHeadDim>;
  const AttentionLayer& layer = args.layer;
  const uint32_t lane = threadIdx.x % kLanes;
  const auto make = [&](uint32_t i) {
    if (i < block.queries) return Head(layer, HeadKind::kQuery, block.first_query + i, lane);
    return Head(layer, i == block.queries ? HeadKind::kKey : HeadKind::kValue, block.kv_head, lane);
  };
  Head heads[kCount] = {make(first)};
  if constexpr (kCount > 1) heads[1] = make(first + kDecodeWarps<Kv>);
  ptx::wait_for_dependencies();
#pragma unroll
  for (Head& head : heads) head.load(args.step, args.launch.rows, block.row);
#pragma unroll
  for (uint32_t i = 0; i < kCount; ++i) {
    const uint32_t index = first + i * kDecodeWarps<Kv>;
    heads[i].finish(layer, Shared::turns(shared));
    if (index < block.queries) {
      heads[i].store(shared + Shared::kQueries + index * Kv::kRowBytes, index);
      continue;
    }
    const bool is_key = index == block.queries;
    heads[i].store(shared + (is_key ? Shared::kOwnKey : Shared::kOwnValue), 0);
    if (!block.leads_kv_head) continue;
    const uint64_t page =
        page_table(args.step, place.sequence)[place.position / backend::kKvPageTokens];
    const uint64_t offset = is_key ? layer.key_offset : layer.value_offset;
    heads[i].store(page_row(page, offset, block.kv_head, place.position, Kv::kRowBytes), 0);
  }
}

// The block's queries to shared memory; where the block has the row's own position, also its key
// and value, there and to their page. Unused query columns are zero. The turns lie in shared memory
// before a barrier.
template <class Kv>
__device__ void prepare_heads(const AttentionKernelArgs& args, const DecodeBlock& block,
                              RowPlace place, bool owns_position, char* shared) {
  using Shared = DecodeShared<Kv>;
  static_assert(kQueryColumns + 2 <= 2 * kDecodeWarps<Kv>);
  const uint32_t warp = threadIdx.x / kLanes;
  const uint32_t count = block.queries + (owns_position ? 2 : 0);
  for (uint32_t i = block.queries * Kv::kChunks + threadIdx.x; i < kQueryColumns * Kv::kChunks;
       i += blockDim.x)
    reinterpret_cast<uint4*>(shared + Shared::kQueries)[i] = {};
  __syncthreads();
  if (warp + kDecodeWarps<Kv> < count) {
    prepare_warp_heads<Kv, 2>(args, block, place, warp, shared);
  } else if (warp < count) {
    prepare_warp_heads<Kv, 1>(args, block, place, warp, shared);
  }
  __syncthreads();
}

// A row of f16 from where prepare_heads left it to its place in a tile.
template <class Kv>
__device__ __forceinline__ void insert_row(const char* from, char* tile, uint32_t row,
                                           uint32_t lane) {
  for (uint32_t chunk = lane; chunk < Kv::kChunks; chunk += kLanes)
    *reinterpret_cast<uint4*>(tile + Kv::chunk_at(row, chunk)) =
        *reinterpret_cast<const uint4*>(from + chunk * 16);
  __syncwarp();
}

// Adds up the results of the first `warps` warps, those with tiles, and merges them with those of
// the other blocks of the row and KV head, `used` in all.
template <class Kv>
__device__ void combine(const AttentionKernelArgs& args, const DecodeBlock& block, uint32_t warps,
                        uint32_t used, DecodeState<Kv>& state, char* shared) {
  using Shared = DecodeShared<Kv>;
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t group = lane / 4, query = lane % 4 * 2;
  float* const all_largest = reinterpret_cast<float*>(shared + Shared::kLargest);  // [warp][query]
  float* const all_sums = reinterpret_cast<float*>(shared + Shared::kSums);
  const bool has_tiles = warp < warps;
  if (has_tiles) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2)
        state.sums[i] += __shfl_xor_sync(kAllLanes, state.sums[i], step);
      if (group == 0) all_largest[warp * kQueryColumns + query + i] = state.largest[i];
    }
  }
  __syncthreads();
  const auto largest_of = [&](uint32_t q) {
    float largest = all_largest[q];
    for (uint32_t w = 1; w < warps; ++w)
      largest = fmaxf(largest, all_largest[w * kQueryColumns + q]);
    return largest;
  };
  if (has_tiles) {
    float shrink[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      shrink[i] = exp2f(state.largest[i] - largest_of(query + i));
      if (group == 0) all_sums[warp * kQueryColumns + query + i] = state.sums[i] * shrink[i];
    }
    float* const results = reinterpret_cast<float*>(shared + warp * 2 * Shared::kTileBytes);
    if (query < block.queries) {
#pragma unroll
      for (int tile = 0; tile < DecodeState<Kv>::kDimTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          results[(query + i % 2) * Shared::kResultStride + 16 * tile + group + i / 2 * 8] =
              state.results[tile][i] * shrink[i % 2];
      }
    }
  }
  __syncthreads();

  constexpr uint32_t kParts = Kv::kHeadDim / kPartColumns;  // of a query
  const uint32_t splits = args.launch.splits;
  SplitPart* const parts =
      args.step.split_parts + uint64_t(block.index) * splits * kQueryColumns * kParts;
  const uint32_t first_column = block.first_query * Kv::kHeadDim;
  constexpr uint32_t kQuads = Kv::kHeadDim / 4;
  for (uint32_t i = threadIdx.x; i < block.queries * kQuads; i += blockDim.x) {
    const uint32_t q = i / kQuads, part = i / kPartQuads, quad = i % kPartQuads;
    float4 values = {};
    float sum = 0;
#pragma unroll 4
    for (uint32_t w = 0; w < warps; ++w) {
      const float4 add = *reinterpret_cast<const float4*>(
          shared + w * 2 * Shared::kTileBytes + (q * Shared::kResultStride + i % kQuads * 4) * 4);
      values = {values.x + add.x, values.y + add.y, values.z + add.z, values.w + add.w};
      sum += all_sums[w * kQueryColumns + q];
    }
    if (used == 1) {
      const float scale = 1.0f / sum;
      store_quads(args.step.output, block.row, first_column + part * kPartColumns,
                  {values.x * scale, values.y * scale, values.z * scale, values.w * scale});
      continue;
    }
    SplitPart& to = parts[part * splits + block.split];
    ptx::store_relaxed(to.values + 4 * quad, values);
    if (quad == 0) ptx::store_relaxed(&to.largest, {largest_of(q), sum, 0, 0});
  }
  if (used == 1) return;

  for (uint32_t part = block.split + warp * used; part < block.queries * kParts;
       part += kDecodeWarps<Kv> * used) {
    const float4 merged = merge_parts<kMergeBatch<Kv>>(parts + part * splits, used, lane);
    if (lane < kPartQuads)
      store_quads(args.step.output, block.row, first_column + part * kPartColumns, merged);
  }
}

template <class Kv>
__global__ void __launch_bounds__(kDecodeWarps<Kv>* kLanes, 1)
    decode_kernel(const __grid_constant__ AttentionKernelArgs args) {
  using Shared = DecodeShared<Kv>;
  extern __shared__ __align__(128) char shared[];
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const DecodeBlock block(args.layer.shape);
  const RowPlace place = args.step.places[block.row];
  const Turns<Kv::kHeadDim, kDecodeWarps<Kv> * kLanes> turns(args.layer);
  const VisibleKeys keys(place.position, args.layer.window);
  const uint32_t begin = keys.split_begin(block.split, args.launch.splits);
  const uint32_t end = keys.split_begin(block.split + 1, args.launch.splits);
  if (begin == end) return;

  char* const key_tile = shared + warp * 2 * Shared::kTileBytes;
  char* const value_tile = key_tile + Shared::kTileBytes;
  const uint32_t key_address = ptx::shared_address(key_tile);
  const uint32_t value_address = ptx::shared_address(value_tile);
  TileReader<Kv> reader(args, block.kv_head, place, keys, lane);
  const auto look_up = [&](uint32_t tile) {
    if (tile < end) reader.look_up(tile);
  };
  const auto ask = [&](uint32_t to, uint64_t layer_offset, uint32_t tile) {
    if (tile < end) reader.ask(to, layer_offset, tile);
    ptx::copy_async_commit();
  };
  const uint32_t first_tile = begin + warp;
  look_up(first_tile);
  turns.compute(place.position, Shared::turns(shared));  // while the addresses come
  ask(key_address, args.layer.key_offset, first_tile);
  ask(value_address, args.layer.value_offset, first_tile);
  look_up(first_tile + Shared::kWarps);
  ptx::launch_dependents();
  prepare_heads<Kv>(args, block, place, end == keys.tiles, shared);

  DecodeState<Kv> state;
  const uint32_t queries = ptx::shared_address(shared + Shared::kQueries);
  for (uint32_t tile = first_tile; tile < end; tile += Shared::kWarps) {
    const uint32_t own_row = place.position - keys.first - tile * kKeyTile;  // or beyond the tile
    ptx::copy_async_wait<1>();
    __syncwarp();
    if (own_row < kKeyTile) insert_row<Kv>(shared + Shared::kOwnKey, key_tile, own_row, lane);
    float scores[4];
    DecodeState<Kv>::scores(key_address, queries, lane, scores);
    __syncwarp();
    ask(key_address, args.layer.key_offset, tile + Shared::kWarps);

#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (lane / 4 + i / 2 * 8 > own_row) scores[i] = -INFINITY;
    uint32_t weights[2];
    state.weigh(scores, weights);

    ptx::copy_async_wait<1>();
    __syncwarp();
    if (own_row < kKeyTile) insert_row<Kv>(shared + Shared::kOwnValue, value_tile, own_row, lane);
    state.add_values(value_address, lane, weights);
    __syncwarp();
    ask(value_address, args.layer.value_offset, tile + Shared::kWarps);
    look_up(tile + 2 * Shared::kWarps);
  }
  combine<Kv>(args, block, min(end - begin, Shared::kWarps), keys.used_splits(args.launch.splits),
              state, shared);
}

template <class Kv>
void launch_decode(cudaStream_t stream, const AttentionKernelArgs& args) {
  constexpr uint32_t kBytes = DecodeShared<Kv>::kBytes;
  NIBBLE_CUDA(cudaFuncSetAttribute(decode_kernel<Kv>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(kBytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t ratio = shape.query_heads / shape.kv_heads;
  const uint32_t groups = (ratio + kQueryColumns - 1) / kQueryColumns;
  launch_dependent(stream, decode_kernel<Kv>,
                   dim3(args.launch.splits, shape.kv_heads * groups, args.launch.single_rows),
                   kDecodeWarps<Kv> * kLanes, kBytes, args);
}

}  // namespace nibble::cuda
