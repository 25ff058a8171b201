#pragma once
// Attention of single rows over keys and values of f16 in rows of their own, norms, RoPE and
// storing included: bounded by the bytes, so a warp takes whole keys. decode_teams.cuh has the
// other forms.
//
// A block has one row, one KV head with up to 8 of its query heads, and a share of the keys that
// the row sees. Its warps work by themselves, each on every kWarps-th tile of 16 keys: they keep a
// tile of keys and one of values in flight, asked for before the wait for the kernel in front,
// since only the row's own key depends on that. Scores are a transposed product, keys x queries, so
// that eight query heads fill the columns of a matrix instruction and each key is read from shared
// memory once; so are the results, head_dim x queries. Softmax is online, per warp; the warps'
// results meet at the end, then the blocks' (merge.cuh).

#include <cmath>

#include "cuda/attention/decode_block.cuh"
#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

// Of kBlocks blocks on a multiprocessor.
template <class Rows, uint32_t kBlocks>
struct SharedBy : Rows {
  static constexpr uint32_t kSharers = kBlocks;
};

template <class Kv>
inline constexpr uint32_t kDecodeWarps = decode_warps(Kv::kHeadDim, Kv::kSharers);

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
  static_assert(kBytes == decode_warps_bytes(Kv::kHeadDim, Kv::kSharers));

  __device__ static float2* turns(char* shared) {
    return reinterpret_cast<float2*>(shared + kTurns);
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
    const char* const first_page = row_of(pages_[0], layer_offset, begin);
    const char* const second_page =
        row_of(pages_[1], layer_offset, 0) - uint64_t(in_first_page) * Kv::kRowBytes;
#pragma unroll 4  // code that runs once is slower to fetch than to run
    for (uint32_t i = 0; i < kKeyTile * Kv::kChunks / kLanes; ++i) {
      const uint32_t row = (i * kLanes + lane_) / Kv::kChunks;
      const uint32_t chunk = (i * kLanes + lane_) % Kv::kChunks;
      const char* const page = row < in_first_page ? first_page : second_page;
      const bool copy = row < stored;
      ptx::copy_async_16_or_zero(to + Kv::chunk_at(row, chunk),
                                 copy ? page + row * Kv::kRowBytes + chunk * 16 : first_page, copy,
                                 policy_);
    }
  }

 private:
  __device__ const char* row_of(uint64_t page, uint64_t layer_offset, uint32_t position) const {
    const uint32_t row = kv_head_ * backend::kKvPageTokens + position % backend::kKvPageTokens;
    return reinterpret_cast<const char*>(page) + layer_offset + uint64_t(row) * Kv::kRowBytes;
  }

  const uint64_t* table_;
  const uint64_t policy_ = ptx::evict_first_policy();
  uint32_t kv_head_, position_, first_, lane_;
  uint64_t pages_[2];
};

// Scores of 16 keys, transposed.
template <class Kv>
__device__ __forceinline__ void tile_scores(uint32_t keys, uint32_t queries, uint32_t lane,
                                            float (&scores)[4]) {
  const uint32_t key_at = keys + Kv::template square_at<true>(lane);
  const uint32_t query_at = queries + Kv::chunk_at(lane % 8, lane / 8);
  float chains[4][4] = {};  // independent sums: the instruction's latency is long
#pragma unroll 2            // as above
  for (int line = 0; line < Kv::kHeadDim / 64; ++line) {
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

// Rows g and g + 8 of result tile m are the dimensions 16 m + g and 16 m + g + 8.
template <class Kv, class State>
__device__ __forceinline__ void add_tile_values(uint32_t values, uint32_t lane,
                                                const uint32_t (&weights)[2], State& state) {
  const uint32_t value_at = values + Kv::template square_at<false>(lane);
#pragma unroll
  for (int tile = 0; tile < State::kDimTiles; ++tile) {
    uint32_t value[4];
    ptx::load_matrices_transposed(value, Kv::skip_chunks(value_at, 2 * tile));
    ptx::multiply_add(state.results[tile], value, weights[0], weights[1]);
  }
}
// As f16, chunks of 16 bytes exchanged by `swizzle`.
template <class Head>
__device__ __forceinline__ void store_f16(const Head& head, char* row, uint32_t swizzle) {
  __half* const to = reinterpret_cast<__half*>(row);
  head.for_each(
      [&](uint32_t d, float x) { to[((d / 8) ^ swizzle) * 8 + d % 8] = __float2half_rn(x); });
}

// Prepares kCount of the block's heads, every kDecodeWarps-th from `first` on: their loads are
// under way together. Heads are numbered queries, key, value. Waits for the kernel in front.
template <class Kv, uint32_t kCount>
__device__ void prepare_warp_heads(const AttentionKernelArgs& args, const DecodeBlock& block,
                                   uint32_t position, uint64_t own_page, uint32_t first,
                                   char* shared) {
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
      store_f16(heads[i], shared + Shared::kQueries + index * Kv::kRowBytes, index);
      continue;
    }
    const bool is_key = index == block.queries;
    store_f16(heads[i], shared + (is_key ? Shared::kOwnKey : Shared::kOwnValue), 0);
    if (!block.leads_kv_head) continue;
    const uint64_t offset = is_key ? layer.kv.key_offset : layer.kv.value_offset;
    store_f16(heads[i], page_row(own_page, layer.kv, offset, block.kv_head, position).numbers, 0);
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
  const uint64_t own_page =  // read before the wait
      page_table(args.step, place.sequence)[place.position / backend::kKvPageTokens];
  __syncthreads();
  if (warp + kDecodeWarps<Kv> < count) {
    prepare_warp_heads<Kv, 2>(args, block, place.position, own_page, warp, shared);
  } else if (warp < count) {
    prepare_warp_heads<Kv, 1>(args, block, place.position, own_page, warp, shared);
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
template <class Kv, class State>
__device__ void combine_warps(const AttentionKernelArgs& args, const DecodeBlock& block,
                              uint32_t warps, uint32_t used, State& state, char* shared) {
  using Shared = DecodeShared<Kv>;
  const uint32_t warp = threadIdx.x / kLanes;
  const UnitStatistics all = {reinterpret_cast<float*>(shared + Shared::kLargest),
                              reinterpret_cast<float*>(shared + Shared::kSums), warps};
  leave_results(state, all, warp, true, block.queries,
                reinterpret_cast<float*>(shared + warp * 2 * Shared::kTileBytes),
                [&](uint32_t q, uint32_t tile, uint32_t row) {
                  return q * Shared::kResultStride + 16 * tile + row;
                });
  finish_block<Kv::kHeadDim>(args, block, used, kDecodeWarps<Kv>, all, [&](uint32_t q, uint32_t d) {
    float4 sum = {};
#pragma unroll 4
    for (uint32_t i = 0; i < warps; ++i)
      add(sum, *reinterpret_cast<const float4*>(shared + i * 2 * Shared::kTileBytes +
                                                (q * Shared::kResultStride + d) * 4));
    return sum;
  });
}

template <class Kv>
__global__ void __launch_bounds__(kDecodeWarps<Kv>* kLanes, Kv::kSharers)
    decode_warps(const __grid_constant__ AttentionKernelArgs args) {
  using Shared = DecodeShared<Kv>;
  extern __shared__ __align__(128) char shared[];
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const DecodeBlock block(args.layer.shape);
  const RowPlace place = args.step.places[block.row];
  const Turns<Kv::kHeadDim> turns(args.layer);
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
  ask(key_address, args.layer.kv.key_offset, first_tile);
  ask(value_address, args.layer.kv.value_offset, first_tile);
  look_up(first_tile + Shared::kWarps);
  ptx::launch_dependents();
  prepare_heads<Kv>(args, block, place, end == keys.tiles, shared);

  DecodeState<Kv::kHeadDim / 16> state;
  const uint32_t queries = ptx::shared_address(shared + Shared::kQueries);
  for (uint32_t tile = first_tile; tile < end; tile += Shared::kWarps) {
    const uint32_t own_row = place.position - keys.first - tile * kKeyTile;  // or beyond the tile
    ptx::copy_async_wait<1>();
    __syncwarp();
    if (own_row < kKeyTile) insert_row<Kv>(shared + Shared::kOwnKey, key_tile, own_row, lane);
    float scores[1][4];
    tile_scores<Kv>(key_address, queries, lane, scores[0]);
    __syncwarp();
    ask(key_address, args.layer.kv.key_offset, tile + Shared::kWarps);

#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (lane / 4 + i / 2 * 8 > own_row) scores[0][i] = -INFINITY;
    uint32_t weights[1][2];
    state.weigh(scores, weights);

    ptx::copy_async_wait<1>();
    __syncwarp();
    if (own_row < kKeyTile) insert_row<Kv>(shared + Shared::kOwnValue, value_tile, own_row, lane);
    add_tile_values<Kv>(value_address, lane, weights[0], state);
    __syncwarp();
    ask(value_address, args.layer.kv.value_offset, tile + Shared::kWarps);
    look_up(tile + 2 * Shared::kWarps);
  }
  combine_warps<Kv>(args, block, min(end - begin, Shared::kWarps),
                    keys.used_splits(args.launch.splits), state, shared);
}

template <class Kv>
void launch_decode_warps(cudaStream_t stream, const AttentionKernelArgs& args) {
  constexpr uint32_t kBytes = DecodeShared<Kv>::kBytes;
  NIBBLE_CUDA(cudaFuncSetAttribute(decode_warps<Kv>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(kBytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t ratio = shape.query_heads / shape.kv_heads;
  const uint32_t groups = (ratio + kQueryColumns - 1) / kQueryColumns;
  launch_dependent(stream, decode_warps<Kv>,
                   dim3(args.launch.splits, shape.kv_heads * groups, args.launch.single_rows),
                   kDecodeWarps<Kv> * kLanes, kBytes, args);
}

}  // namespace nibble::cuda
