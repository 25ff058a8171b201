#pragma once
// How the rows of a step are shared among attention's blocks. No CUDA toolkit needed.

#include <cstdint>
#include <iterator>

#include "backend/kv_format.h"
#include "backend/plan.h"
#include "cuda/device_shape.h"

namespace nibble::cuda {

// Keys that a warp takes at a time.
inline constexpr uint32_t kKeyTile = 16;
// Query heads of one KV head that a decode block takes: the columns of one matrix instruction.
inline constexpr uint32_t kQueryColumns = 8;
// Queries (tokens x heads of one KV head) that a prefill block takes.
inline constexpr uint32_t kQueryTile = 64;

// What a block of the mma.sync prefill kernel takes at a time: queries of a tile, and so many pages
// of keys and of values.
struct MmaTile {
  uint32_t queries, pages;

  constexpr uint32_t threads() const { return queries * 4; }
  constexpr uint32_t shared_bytes(uint32_t head_dim) const {
    const uint32_t weights = queries * (backend::kKvPageTokens * 2 + 16);
    return (queries + 2 * pages * backend::kKvPageTokens) * head_dim * 2 + weights + queries * 8;
  }
};
// Largest first.
inline constexpr MmaTile kMmaTiles[] = {{kQueryTile, 2}, {kQueryTile, 1}, {kQueryTile / 2, 1}};
// Of a block, on any device from compute capability 8.0 on.
inline constexpr uint32_t kLeastSharedBytes = 99 << 10;
// The first of kMmaTiles that fits.
constexpr uint32_t mma_tile(uint32_t head_dim, uint32_t shared_bytes) {
  uint32_t tile = 0;
  while (tile + 1 < std::size(kMmaTiles) && kMmaTiles[tile].shared_bytes(head_dim) > shared_bytes)
    ++tile;
  return tile;
}
// A layer's rows in its pages: docs/formats/kv-pages.md.
struct KvRows {
  backend::KvFormat format;
  bool shared;                        // one row for key and value
  backend::SharedKvRow order;         // of a row's values; rope_dims is 0 where rows are split
  uint32_t block;                     // values that share a scale, or 0
  uint32_t row_bytes;                 // of a row's numbers
  uint32_t row_scales;                // in a row
  uint32_t head_bytes;                // of a head in a page: all its numbers, then all its scales
  uint64_t key_offset, value_offset;  // KvLayer's
  bool rotated;                       // numbers are of blocks that are turned together

  constexpr uint32_t values() const { return order.values(); }
  // Whether the weighted sum of values is not what they stand for yet: it is rotated, or in another
  // order than that of dimensions.
  constexpr bool restores_results() const { return rotated || order.rope_dims > 0; }
};
KvRows kv_rows(const backend::KvLayer& layer, uint32_t head_dim);

// Single rows over f16 in rows of their own, where there is room: warps of a block, and its shared
// memory (decode_warps.cuh).
// sharers: blocks of a multiprocessor, 1 or, with heads of kSharingHeadDim, 2
inline constexpr uint32_t kSharingHeadDim = 256;
constexpr uint32_t decode_warps(uint32_t head_dim, uint32_t sharers) {
  return head_dim <= 256 && sharers == 1 ? 8 : 6;
}
constexpr uint32_t decode_warps_bytes(uint32_t head_dim, uint32_t sharers) {
  const uint32_t warps = decode_warps(head_dim, sharers), row = 2 * head_dim;
  const uint32_t statistics = 2 * warps * kQueryColumns * 4, turns = head_dim / 2 * 8;
  return (warps * 2 * kKeyTile + kQueryColumns + 2) * row + statistics + turns;
}

// Other single rows (decode_teams.cuh). Dimensions of a head that a warp takes; the rest of its
// team has the others.
constexpr uint32_t part_dims(uint32_t head_dim) {
  return head_dim < 128 ? head_dim : 128;
}
// Bytes of a part of a row.
constexpr uint32_t part_row_bytes(backend::KvFormat format, uint32_t head_dim) {
  const uint32_t dims = part_dims(head_dim);
  return format == backend::KvFormat::kF16  ? 2 * dims
         : format == backend::KvFormat::kQ8 ? dims
                                            : dims / 2;
}
// Bytes between such parts in shared memory. F16: 16, modulo 32. Blocks: four lanes read a block of
// a row in one piece, and as many rows as fill all banks at once begin a piece behind each other.
constexpr uint32_t part_row_stride(backend::KvFormat format, uint32_t head_dim, uint32_t block) {
  const uint32_t bytes = part_row_bytes(format, head_dim);
  const uint32_t piece = block == 0 ? 16 : bytes / (part_dims(head_dim) / block);
  return bytes / piece % 2 == 1 ? bytes : bytes + piece;
}
// Keys of a tile: a page's.
inline constexpr uint32_t kTeamKeys = backend::kKvPageTokens;
// Tiles that a warp has in flight.
constexpr uint32_t decode_stages(backend::KvFormat format) {
  return format == backend::KvFormat::kTq4 ? 3 : 1;
}
// Of a row that a warp is making: 16 values, then a gap of 4.
constexpr uint32_t staged_place(uint32_t index) {
  return index + index / 16 * 4;
}
constexpr uint32_t staged_floats(uint32_t values) {
  return values / 16 * 20;
}
// Results of a query in shared memory, floats: four lanes write a block of values, each a piece of
// it, and a gap of 4 behind each piece keeps them off the same banks; as 4 more do for queries.
constexpr uint32_t result_place(uint32_t dim, uint32_t block) {
  return block == 0 ? dim : dim + dim / (block / 4) * 4;
}
constexpr uint32_t result_stride(uint32_t head_dim, uint32_t block) {
  return result_place(head_dim, block) + 4;
}

inline constexpr uint32_t kMostDecodeWarps = 12;

// The shared memory of a block, in bytes: its teams' rings, then what begins where it says. Depends
// on the device, and through it does the number of warps.
struct DecodeShape {
  uint32_t warps;         // of whole teams
  uint32_t team_bytes;    // its ring; at the end, its results
  uint32_t queries;       // f16 [kQueryColumns, query_stride]
  uint32_t query_stride;  // between queries
  uint32_t own_rows;      // the row's own key and value, or shared row
  uint32_t own_stride;    // from one to the other
  uint32_t staged;        // f32: rows being made, [warps, staged_floats]; later results in order
  uint32_t exchange;      // f32 [teams, 2, 2, warps of a team, 32, 4]: parts of scores
  uint32_t statistics;    // f32 [2, teams, kQueryColumns]: largest score, sum
  uint32_t turns;         // float2 [head_dim / 2]
  uint32_t bytes;
};

// Throws Error(kUnsupported) where a block of the device has too little shared memory for a warp.
DecodeShape decode_shape(const DeviceShape& device, const backend::AttentionShape& shape,
                         const KvRows& rows);

// Fixed when a step is captured: depends on sizes alone, never on positions.
struct AttentionLaunch {
  uint32_t rows;
  // Rows [0, single_rows) are each the only one of its sequence in the step: norms, RoPE and
  // storing are part of their attention kernel, and their keys are split over `splits` blocks.
  uint32_t single_rows;
  uint32_t splits = 1;
  DecodeShape decode = {};  // where decode_teams.cuh serves them, else empty
  uint32_t sharers = 1;     // blocks of decode_warps.cuh on a multiprocessor
  // Of the other rows' kernel:
  MatrixUnit unit = MatrixUnit::kMma;
  uint32_t mma_tile = 0;  // index into kMmaTiles
};

// At least one block of a single row's kernel a multiprocessor, whatever the length of the
// sequences. Where keys are split there is no more than that: the blocks wait for each other.
AttentionLaunch choose_attention(const DeviceShape& device, MatrixUnit unit,
                                 const backend::AttentionShape& shape, const KvRows& kv,
                                 uint32_t rows, uint32_t single_rows);

// Rows whose queries of one KV head share a tile.
constexpr uint32_t query_tile_tokens(const backend::AttentionShape& shape) {
  return kQueryTile / (shape.query_heads / shape.kv_heads);
}

// How compressed keys and values are attended to on wgmma. To bring rows to f16 in front of the
// tensor cores costs more than they do, and each of some hundred query tiles would do it again. So
// a section of each sequence's pages is expanded once for all tiles, attended to, and gives way to
// the next one (docs/measurements/prefill.md).
struct KeySections {
  uint32_t pages;  // of a sequence, in a section; 0: there is no room, or it would not pay
  // In scratch, in bytes: behind what blocks keep from one section to the next, the block tables
  // of the expanded pages, and these.
  uint64_t table_at, pages_at;
};
// chunks: sequences of more than one row, of `sequences`; their rows see most_pages pages or less.
// table_stride: BlockTables'
KeySections choose_sections(const backend::AttentionShape& shape, const KvRows& kv,
                            const AttentionLaunch& launch, uint32_t sequences, uint32_t chunks,
                            uint32_t most_pages, uint32_t table_stride, uint64_t scratch_bytes);

// What a block found for one query and 32 columns, to be merged with other splits' (merge.cuh).
inline constexpr uint32_t kPartColumns = 32;
struct alignas(16) SplitPart {
  float values[kPartColumns];  // sums of weighted values, weights relative to `largest`
  float largest, sum;          // score, of the weights
  float unused[2];
};
static_assert(sizeof(SplitPart) == 144);

// Parts that any launch of choose_attention() can need.
uint64_t most_split_parts(uint32_t multiprocessors);

// Bytes of the workspace: the f16 queries of rows [single_rows, rows), tiles as QueryTiles says.
uint64_t attention_workspace_bytes(const backend::AttentionShape& shape,
                                   const AttentionLaunch& launch);

}  // namespace nibble::cuda
