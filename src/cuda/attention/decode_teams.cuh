#pragma once
// Attention of single rows over compressed or shared rows, norms, RoPE and storing included:
// bounded by what it takes to make f16 of them as much as by the bytes. decode_warps.cuh has the
// other form.
//
// A block has one row, one KV head with up to 8 of its query heads, and a share of the keys that
// the row sees. Its warps form teams. A team takes every teams-th page, and a warp of it
// at most 128 dimensions of them: it brings its part of keys and values, asked for before the wait
// for the kernel in front, since only the row's own key depends on that; multiplies its part of the
// queries by its part of the keys; adds up with the rest of the team, so that all of it know the
// scores; and multiplies the weights by its part of the values. Scores are a transposed product,
// keys x queries, so that eight query heads fill the columns of a matrix instruction; so are the
// results, dimensions x queries. Softmax is online, per team; the teams' results meet at the end,
// then the blocks' (merge.cuh). What formats of keys and values differ in is in their classes
// (kv_*.cuh).

#include <cmath>

#include "cuda/attention/decode_block.cuh"
#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/kv_row.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

template <class Kv>
using TeamState = DecodeState<Kv::kDimTiles, Kv::kWeightBits>;

// The part of the head that a warp takes. The first part of shared rows is the most work: that of
// each team is another scheduler's.
__device__ __forceinline__ uint32_t part_of(uint32_t warp, uint32_t team) {
  return (warp + warp / team) % team;
}

// A warp's ring of tiles in shared memory: parts of keys, and of values where they are not what the
// keys are. The team's rings of keys stand before those of values. Compressed keys are in registers
// once they are multiplied with queries, even where they are values, too: their place is free then,
// but for the scales, which have one place more.
template <class Kv>
class TileRing {
  static constexpr uint32_t kStages = Kv::kStages;
  static constexpr uint32_t kRowsBytes = kTeamKeys * Kv::kStride;

 public:
  __device__ TileRing(const AttentionKernelArgs& args, const WarpShare& share, char* team,
                      uint32_t lane)
      : kv_(args.layer.kv),
        share_(share),
        table_(page_table(args.step, share.place.sequence)),
        scale_bytes_(kTeamKeys * 2 * kv_.row_scales),
        lane_(lane) {
    const uint32_t part = share.first_dim / Kv::kPartDims;
    const uint32_t key_bytes = kStages * kRowsBytes + (kStages + 1) * scale_bytes_;
    value_bytes_ = kRowsBytes + (kv_.shared ? 0 : scale_bytes_);
    const uint32_t rings = ptx::shared_address(team);
    keys_ = rings + part * key_bytes;
    values_ = rings + Kv::kTeam * key_bytes + part * kStages * value_bytes_;
  }

  // Looks up where the first tiles lie.
  __device__ void look_up_first(uint64_t (&pages)[kStages]) const {
#pragma unroll
    for (uint32_t i = 0; i < kStages; ++i) pages[i] = look_up(share_.tile + i * share_.stride);
  }
  // Fills the ring.
  __device__ void ask_first(const uint64_t (&pages)[kStages]) {
#pragma unroll
    for (uint32_t i = 0; i < kStages; ++i) {
      page_ = pages[i];
      ask_keys();
      ptx::copy_async_commit();
      ask_values();
      advance();
    }
    page_ = look_up(share_.tile);
  }

  // The next tile's keys, there for all lanes.
  __device__ __forceinline__ KvTile wait_for_keys() const {
    if (reads_keys_twice()) {
      ptx::copy_async_wait<2 * kStages - 2>();
    } else {
      ptx::copy_async_wait<2 * kStages - 1>();
    }
    __syncwarp();
    return {key_rows(), scales(scale_slot_), 2 * kv_.row_scales};
  }
  // They have been read by all lanes.
  __device__ __forceinline__ void release_keys() {
    __syncwarp();
    if (!reads_keys_twice()) ask_keys();
    ptx::copy_async_commit();
  }
  // The same tile's values.
  __device__ __forceinline__ KvTile wait_for_values() const {
    if (!reads_keys_twice()) {
      ptx::copy_async_wait<2 * kStages - 1>();
      __syncwarp();
    }
    const uint32_t own_scales = values() + kRowsBytes;
    return {values(), kv_.shared ? scales(scale_slot_) : own_scales, 2 * kv_.row_scales};
  }
  __device__ __forceinline__ void release_values() {
    __syncwarp();
    if (reads_keys_twice()) ask_keys();
    ask_values();
    advance();
    page_ = look_up(share_.tile);
  }

 private:
  __device__ __forceinline__ uint32_t values() const {
    return values_ + slot_ * value_bytes_;
  }
  __device__ __forceinline__ uint32_t key_rows() const {
    return keys_ + slot_ * kRowsBytes;
  }
  __device__ __forceinline__ uint32_t scales(uint32_t slot) const {
    return keys_ + kStages * kRowsBytes + slot * scale_bytes_;
  }
  __device__ __forceinline__ bool reads_keys_twice() const {
    return !Kv::kInBlocks && kv_.shared;
  }

  __device__ __forceinline__ uint64_t look_up(uint32_t tile) const {
    return tile < share_.end ? table_[share_.keys.begin / kTeamKeys + tile] : 0;
  }

  __device__ __forceinline__ void ask_keys() const {
    ask(key_rows(), scales(scale_slot_ == 0 ? kStages : scale_slot_ - 1), kv_.key_offset,
        share_.first_dim, Kv::kPartDims);
  }
  __device__ __forceinline__ void ask_values() const {
    if (share_.own_values > 0)
      ask(values(), kv_.shared ? 0 : values() + kRowsBytes, kv_.value_offset, share_.value_begin,
          share_.own_values);
  }
  // Copies `dims` of a page's rows, from dimension `begin` of a row on, and the rows' scales if
  // `scales` is a place for them. The row's own position and what is behind it come along, as
  // nothing that counts.
  __device__ __forceinline__ void ask(uint32_t to, uint32_t scales, uint64_t offset, uint32_t begin,
                                      uint32_t dims) const {
    if (share_.tile >= share_.end) return;
    constexpr uint32_t kChunks = Kv::kPartBytes / 16;  // of a row
    const KvRow page = page_row(page_, kv_, offset, share_.kv_head, 0);
    const uint32_t row = lane_ / kChunks, chunk = lane_ % kChunks;
    if (chunk * 16 < Kv::bytes_of(dims)) {
      const char* const from =
          page.numbers + Kv::bytes_of(begin) + row * kv_.row_bytes + chunk * 16;
      constexpr uint32_t kRowsAtOnce = kLanes / kChunks;
#pragma unroll
      for (uint32_t i = 0; i < kTeamKeys; i += kRowsAtOnce)
        ptx::copy_async_16(to + (row + i) * Kv::kStride + chunk * 16, from + i * kv_.row_bytes,
                           policy_);
    }
    if constexpr (Kv::kInBlocks) {
      constexpr uint32_t kMostBytes = kTeamKeys * 2 * 2 * Kv::kHeadDim / Kv::kBlock;
      if (scales == 0) return;
#pragma unroll
      for (uint32_t i = 0; i < kMostBytes; i += kLanes * 16) {
        const uint32_t at = i + lane_ * 16;
        if (at < scale_bytes_)
          ptx::copy_async_16(scales + at, reinterpret_cast<const char*>(page.scales) + at);
      }
    }
  }
  __device__ __forceinline__ void advance() {
    ptx::copy_async_commit();
    share_.tile += share_.stride;
    if (++slot_ == kStages) slot_ = 0;
    if (++scale_slot_ == kStages + 1) scale_slot_ = 0;
  }

  const KvRows& kv_;
  const uint64_t policy_ = ptx::evict_first_policy();
  WarpShare share_;  // still to be asked for
  const uint64_t* table_;
  uint32_t keys_, values_, value_bytes_;
  uint32_t scale_bytes_, lane_;  // of a tile
  uint64_t page_;                // that is asked for next
  uint32_t slot_ = 0;            // that is read, and then asked for, next
  uint32_t scale_slot_ = 1;      // that is read; the one before it is asked for next
};

// 16 bytes a lane; `bytes` is a multiple of 16.
__device__ __forceinline__ void copy_by_warp(void* to, const void* from, uint32_t bytes,
                                             uint32_t lane) {
  for (uint32_t i = lane; i < bytes / 16; i += kLanes)
    static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
}

// What one warp makes of the step's sums for its block: queries, and rows for the page.
template <class Kv>
class HeadMaker {
  using Head = WarpHead<Kv::kHeadDim, true>;

 public:
  __device__ HeadMaker(const AttentionKernelArgs& args, const DecodeBlock& block, RowPlace place,
                       char* shared)
      : args_(args),
        at_(args.launch.decode),
        block_(block),
        page_(page_table(args.step, place.sequence)[place.position / backend::kKvPageTokens]),
        position_(place.position),
        shared_(shared),
        lane_(threadIdx.x % kLanes),
        rows_(args.layer, reinterpret_cast<const float2*>(shared + at_.turns),
              reinterpret_cast<float*>(shared + at_.staged) +
                  threadIdx.x / kLanes * staged_floats(Kv::kHeadDim),
              lane_) {}

  // How many there are, where the block has the row's own position.
  __device__ uint32_t count() const { return block_.queries + rows_.part_count(); }

  // A query, or then the key and the value or the parts of the shared row. Waits for the kernel in
  // front.
  __device__ void make(uint32_t index) {
    const KvRows& kv = args_.layer.kv;
    const uint32_t queries = block_.queries;
    const HeadKind kind = index < queries                 ? HeadKind::kQuery
                          : index == queries || kv.shared ? HeadKind::kKey
                                                          : HeadKind::kValue;
    const uint32_t of_kind = kind == HeadKind::kQuery ? block_.first_query + index : block_.kv_head;
    Head head(args_.layer, kind, of_kind, lane_);
    ptx::wait_for_dependencies();
    head.load(args_.step, args_.launch.rows, block_.row);
    rows_.turn(head, index != queries || !kv.shared);
    if (index < queries) {
      __half* const to =
          reinterpret_cast<__half*>(shared_ + at_.queries + index * at_.query_stride);
      rows_.put_query(head, [&](uint32_t d) { return to + Kv::query_place(d); });
    } else {
      put_own(head, index - queries);
    }
  }

 private:
  // To the block and to the page.
  __device__ void put_own(const Head& head, uint32_t index) const {
    const KvRows& kv = args_.layer.kv;
    const uint32_t row = kv.shared ? 0 : index;
    const auto part = rows_.part(index);
    char* const own = shared_ + at_.own_rows + row * at_.own_stride;
    rows_.put_part(head, part, {own, reinterpret_cast<__half*>(own + kv.row_bytes)});
    if (!block_.leads_kv_head) return;
    const KvRow to =
        page_row(page_, kv, row == 0 ? kv.key_offset : kv.value_offset, block_.kv_head, position_);
    const uint32_t begin = Kv::bytes_of(part.begin);
    copy_by_warp(to.numbers + begin, own + begin, Kv::bytes_of(part.end) - begin, lane_);
    if constexpr (Kv::kInBlocks) {
      const uint32_t scale = part.begin / Kv::kBlock + lane_;
      if (scale < part.end / Kv::kBlock)
        to.scales[scale] = reinterpret_cast<const __half*>(own + kv.row_bytes)[scale];
    }
  }

  const AttentionKernelArgs& args_;
  const DecodeShape& at_;
  const DecodeBlock& block_;
  const uint64_t page_;  // the row's own; read before the wait
  const uint32_t position_;
  char* shared_;
  uint32_t lane_;
  RowMaker<Kv> rows_;
};

// The block's queries to shared memory; where the block has the row's own position, also its key
// and value, there and to their page. Unused query columns are zero. The turns lie in shared memory
// before a barrier.
template <class Kv>
__device__ void make_heads(const AttentionKernelArgs& args, const DecodeBlock& block,
                           RowPlace place, bool owns_position, char* shared) {
  const DecodeShape& at = args.launch.decode;
  const uint32_t warp = threadIdx.x / kLanes, warps = blockDim.x / kLanes;
  const uint32_t chunks = at.query_stride / 16;
  for (uint32_t i = block.queries * chunks + threadIdx.x; i < kQueryColumns * chunks;
       i += blockDim.x)
    reinterpret_cast<uint4*>(shared + at.queries)[i] = {};
  __syncthreads();
  HeadMaker<Kv> maker(args, block, place, shared);
  const uint32_t count = owns_position ? maker.count() : block.queries;
#pragma unroll 1  // mostly once
  for (uint32_t index = warp; index < count; index += warps) maker.make(index);
  __syncthreads();
}

// Part of the row's own key or value (or shared row) to its place in a tile. What lies behind it
// counts for nothing: numbers or scales there become zero, lest they are not finite.
template <class Kv>
__device__ void insert_own_row(const KvRows& kv, const char* own, uint32_t begin, uint32_t dims,
                               const KvTile& tile, uint32_t row, uint32_t lane) {
  if (dims == 0) return;
  if (lane * 16 < Kv::bytes_of(dims))
    ptx::store_shared(tile.rows + row * Kv::kStride + lane * 16,
                      *reinterpret_cast<const uint4*>(own + Kv::bytes_of(begin) + lane * 16));
  if constexpr (Kv::kInBlocks) {
    const uint16_t* const scales = reinterpret_cast<const uint16_t*>(own + kv.row_bytes);
    for (uint32_t i = row * kv.row_scales + lane; i < kTeamKeys * kv.row_scales; i += kLanes) {
      const uint32_t own_scale = i - row * kv.row_scales;
      ptx::store_shared(tile.scales + 2 * i, own_scale < kv.row_scales ? scales[own_scale] : 0);
    }
  } else {
    for (uint32_t i = (row + 1) * Kv::kStride + lane * 16; i < kTeamKeys * Kv::kStride;
         i += kLanes * 16)
      ptx::store_shared(tile.rows + i, uint4{});
  }
  __syncwarp();
}

// The team's warps' parts of scores, added up in one order: all get the same. Two buffers take
// turns, so that one barrier does.
template <class Kv>
class TeamSum {
 public:
  __device__ TeamSum(char* buffers, uint32_t team, uint32_t part, uint32_t lane)
      : buffer_(ptx::shared_address(buffers) + team * kTeamBytes + lane * 16),
        team_(team),
        part_(part) {}

  static constexpr uint32_t kPartBytes = 2 * kLanes * 16;
  static constexpr uint32_t kTeamBytes = 2 * Kv::kTeam * kPartBytes;

  // Waits for the rest of the team.
  __device__ __forceinline__ void sync() const {
    if constexpr (Kv::kTeam > 1) ptx::sync_threads(1 + team_, Kv::kTeam * kLanes);
  }
  __device__ __forceinline__ void add(float (&scores)[2][4]) {
    if constexpr (Kv::kTeam > 1) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half)
        ptx::store_shared(buffer_ + (turn_ + part_) * kPartBytes + half * kLanes * 16,
                          {__float_as_uint(scores[half][0]), __float_as_uint(scores[half][1]),
                           __float_as_uint(scores[half][2]), __float_as_uint(scores[half][3])});
      sync();
#pragma unroll
      for (uint32_t part = 0; part < Kv::kTeam; ++part) {
#pragma unroll
        for (uint32_t half = 0; half < 2; ++half) {
          uint32_t words[4];
          ptx::load_shared(words, buffer_ + (turn_ + part) * kPartBytes + half * kLanes * 16);
#pragma unroll
          for (int i = 0; i < 4; ++i)
            scores[half][i] =
                part == 0 ? __uint_as_float(words[i]) : scores[half][i] + __uint_as_float(words[i]);
        }
      }
      turn_ ^= Kv::kTeam;
    }
  }

 private:
  const uint32_t buffer_, team_, part_;
  uint32_t turn_ = 0;
};

// Where a team leaves the sum of query q and dimension d, in the order of the key's values on a
// row: an index into floats.
template <class Kv>
__device__ __forceinline__ uint32_t result_at(uint32_t q, uint32_t d) {
  return q * result_stride(Kv::kHeadDim, Kv::kBlock) + result_place(d, Kv::kBlock);
}

// Adds up the teams' results and undoes their rotation: to `restored`, as a team's. A warp has a
// query at a time, a lane 16 dimensions that are neighbours on a row.
template <class Kv>
__device__ void rotate_results(const DecodeShape& at, uint32_t queries, uint32_t teams,
                               const char* shared, float* restored) {
  const uint32_t lane = threadIdx.x % kLanes, first = lane * kLaneValues;
  for (uint32_t q = threadIdx.x / kLanes; q < queries; q += blockDim.x / kLanes) {
    float4 quads[kLaneValues / 4] = {};
    if (first < Kv::kHeadDim) {
#pragma unroll 1
      for (uint32_t team = 0; team < teams; ++team) {
        const float* const from = reinterpret_cast<const float*>(shared + team * at.team_bytes);
#pragma unroll
        for (uint32_t i = 0; i < kLaneValues / 4; ++i)
          add(quads[i], *reinterpret_cast<const float4*>(from + result_at<Kv>(q, first + 4 * i)));
      }
    }
    float x[kLaneValues];
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues / 4; ++i)
      x[4 * i] = quads[i].x, x[4 * i + 1] = quads[i].y, x[4 * i + 2] = quads[i].z,
            x[4 * i + 3] = quads[i].w;
    Kv::Codec::template rotate_back<Kv::kBlock>(x, lane);
    if (first < Kv::kHeadDim) {
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; i += 4)
        *reinterpret_cast<float4*>(restored + result_at<Kv>(q, first + i)) = {x[i], x[i + 1],
                                                                              x[i + 2], x[i + 3]};
    }
  }
  __syncthreads();
}

// Adds up the results of the first `teams` teams, those with tiles, and merges them with those of
// the other blocks of the row and KV head, `used` in all.
template <class Kv>
__device__ void combine_teams(const AttentionKernelArgs& args, const DecodeBlock& block,
                              uint32_t teams, uint32_t used, TeamState<Kv>& state, char* shared) {
  const DecodeShape& at = args.launch.decode;
  const uint32_t warp = threadIdx.x / kLanes;
  const uint32_t team = warp / Kv::kTeam, part = part_of(warp, Kv::kTeam);
  float* const largest = reinterpret_cast<float*>(shared + at.statistics);
  const UnitStatistics all = {largest, largest + at.warps / Kv::kTeam * kQueryColumns, teams};
  leave_results(state, all, team, part == 0, block.queries,
                reinterpret_cast<float*>(shared + team * at.team_bytes),
                [&](uint32_t q, uint32_t tile, uint32_t row) {
                  return result_at<Kv>(q, Kv::result_dim(part * Kv::kDimTiles + tile, row));
                });
  const char* results = shared;
  uint32_t addends = teams;
  if constexpr (Kv::kRotated) {
    rotate_results<Kv>(at, block.queries, teams, shared,
                       reinterpret_cast<float*>(shared + at.staged));
    results = shared + at.staged;
    addends = 1;
  }
  finish_block<Kv::kHeadDim>(args, block, used, at.warps, all, [&](uint32_t q, uint32_t d) {
    const float* from = reinterpret_cast<const float*>(results) +
                        result_at<Kv>(q, args.layer.kv.order.key_place(d));
    float4 sum = *reinterpret_cast<const float4*>(from);
#pragma unroll 1
    for (uint32_t i = 1; i < addends; ++i) {
      from += at.team_bytes / sizeof(float);
      add(sum, *reinterpret_cast<const float4*>(from));
    }
    return sum;
  });
}

template <class Kv>
__global__ void __launch_bounds__(kMostDecodeWarps* kLanes, 1)
    decode_teams(const __grid_constant__ AttentionKernelArgs args) {
  extern __shared__ __align__(128) char shared[];
  const DecodeShape& at = args.launch.decode;
  const KvRows& kv = args.layer.kv;
  const uint32_t warp = threadIdx.x / kLanes, lane = threadIdx.x % kLanes;
  const uint32_t team = warp / Kv::kTeam, teams = at.warps / Kv::kTeam;
  const uint32_t part = part_of(warp, Kv::kTeam);
  const DecodeBlock block(args.layer.shape);
  const RowPlace place = args.step.places[block.row];
  const Turns<Kv::kHeadDim> turns(args.layer);
  const VisibleKeys keys(place.position, args.layer.window, kTeamKeys, kTeamKeys);
  const uint32_t begin = keys.split_begin(block.split, args.launch.splits);
  const uint32_t end = keys.split_begin(block.split + 1, args.launch.splits);
  if (begin == end) return;

  WarpShare share = {place, keys, block.kv_head, begin + team, end, teams, 0, 0, 0};
  share.set_part<Kv>(kv, part);
  TileRing<Kv> ring(args, share, shared + team * at.team_bytes, lane);
  uint64_t pages[Kv::kStages];
  ring.look_up_first(pages);
  turns.compute(place.position, reinterpret_cast<float2*>(shared + at.turns));
  ring.ask_first(pages);
  ptx::launch_dependents();
  make_heads<Kv>(args, block, place, end == keys.tiles, shared);

  uint32_t queries[2 * Kv::kDimTiles];
  Kv::load_queries(ptx::shared_address(shared + at.queries) + part * Kv::kPartDims * 2,
                   at.query_stride, lane, queries);
  TeamSum<Kv> team_sum(shared + at.exchange, team, part, lane);
  TeamState<Kv> state;
  const char* const own_key = shared + at.own_rows;
  const char* const own_value = own_key + (kv.shared ? 0 : at.own_stride);
  uint32_t tile = begin + team;
#pragma unroll 1
  for (; tile < end; tile += teams) {
    const uint32_t first = keys.begin + tile * kTeamKeys;
    const uint32_t own_row = place.position - first;  // or beyond the tile
    const KvTile key_tile = ring.wait_for_keys();
    if (own_row < kTeamKeys)
      insert_own_row<Kv>(kv, own_key, share.first_dim, Kv::kPartDims, key_tile, own_row, lane);
    typename Kv::Numbers numbers[2];
    float scores[2][4];
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
      Kv::scores(key_tile.template from<Kv>(half * kKeyTile), share.first_dim, queries, lane,
                 numbers[half], scores[half]);
    ring.release_keys();
    team_sum.add(scores);
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = half * kKeyTile + lane / 4 + i / 2 * 8;
        if (row > own_row || first + row < keys.first) scores[half][i] = -INFINITY;
      }
    }
    uint32_t weights[2][2];
    state.weigh(scores, weights);

    const KvTile value_tile = ring.wait_for_values();
    if (own_row < kTeamKeys)
      insert_own_row<Kv>(kv, own_value, share.value_begin, share.own_values, value_tile, own_row,
                         lane);
    if (share.own_values > 0) {
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half)
        Kv::take_values(value_tile.template from<Kv>(half * kKeyTile), share, lane, numbers[half]);
    }
#pragma unroll
    for (uint32_t half = 0; half < 2; ++half)
      Kv::add_values(key_tile.template from<Kv>(half * kKeyTile),
                     value_tile.template from<Kv>(half * kKeyTile), share, lane, weights[half],
                     numbers[half], state.results);
    ring.release_values();
  }
  // Racecheck wants all of a block to have met as many barriers, whichever they are.
  if (tile - team < end) team_sum.sync();
  combine_teams<Kv>(args, block, min(end - begin, teams), keys.used_splits(args.launch.splits),
                    state, shared);
}

template <class Kv>
void launch_decode_teams(cudaStream_t stream, const AttentionKernelArgs& args) {
  const DecodeShape& at = args.launch.decode;
  NIBBLE_CUDA(cudaFuncSetAttribute(decode_teams<Kv>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   int(at.bytes)));
  const backend::AttentionShape& shape = args.layer.shape;
  const uint32_t ratio = shape.query_heads / shape.kv_heads;
  const uint32_t groups = (ratio + kQueryColumns - 1) / kQueryColumns;
  launch_dependent(stream, decode_teams<Kv>,
                   dim3(args.launch.splits, shape.kv_heads * groups, args.launch.single_rows),
                   at.warps * kLanes, at.bytes, args);
}

}  // namespace nibble::cuda
