#pragma once
// Attention of a block of query rows to a span of one KV head's keys and values, and how the
// results of spans become one.
//
// A row's keys are cut into spans at fixed positions, each span is an online softmax page by page,
// and the spans are merged in ascending order. Which rows share a block, which thread runs which
// span, and whether the spans' results wait in memory for each other, all that changes nothing in
// a row's sequence of operations: its result is the same to the bit.

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "backend/kv_format.h"
#include "cpu/isa.h"

namespace nibble::cpu {

inline constexpr uint32_t kSpanPages = 16;
inline constexpr uint32_t kSpanTokens = kSpanPages * backend::kKvPageTokens;

// Query rows that share the reads of keys and values. Their states and queries and a page of
// halves fit a second-level cache of 256 KiB at head_dim 512.
inline constexpr uint32_t kMaxBlockRows = 32;

struct QueryBlock {
  uint32_t rows;
  uint32_t head_dim;
  float scale;
  const float* queries[kMaxBlockRows];  // [head_dim] each
  uint32_t begin[kMaxBlockRows];        // the row sees keys at positions [begin, end)
  uint32_t end[kMaxBlockRows];
};

// The part [begin, end) of the pages that start at position `first`: what any row of a block sees.
struct KvSpan {
  uint32_t first;
  uint32_t begin;
  uint32_t end;

  // Of every page, the head's first row: of what it holds as in KvRowLayout, the numbers and scales
  // of the key or the value alone.
  struct Rows {
    const std::byte* numbers[kSpanPages];
    const uint16_t* scales[kSpanPages];  // f16; nullptr where the format has none
  };
  Rows keys, values;
  uint32_t row_bytes;   // from one row's numbers to the next one's
  uint32_t row_scales;  // from one row's scales to the next one's
  uint32_t block;       // values that share a scale
};

// Softmax of each row over the keys so far, not yet divided by its sum. An empty one is 0 / 0.
struct SoftmaxState {
  float* maximum;  // [rows] of the scores
  float* sum;      // [rows] of exp(score - maximum)
  float* values;   // [rows, head_dim], values weighted with exp(score - maximum)
};

// Rows on their way from a stored format to floats, never more than lie in the first-level cache:
// four keys at a time, or kTileDims of a page's values.
inline constexpr uint32_t kTileKeys = 4;
inline constexpr uint32_t kTileDims = 64;
constexpr size_t tile_floats(size_t head_dim) {
  const size_t keys = kTileKeys * head_dim, values = backend::kKvPageTokens * kTileDims;
  return keys > values ? keys : values;
}

struct AttentionScratch {
  float* tile;                                          // [tile_floats(head_dim)]
  float scores[kMaxBlockRows][backend::kKvPageTokens];  // then their exponentials
  float decay[kMaxBlockRows];  // what the page's new maximum makes of earlier sums
};

struct AttentionKernels {
  uint32_t lanes;  // head_dim must be a multiple of it

  void (*clear)(const QueryBlock& block, const SoftmaxState& state);
  // Sets `state` to the span's; by format. With tq4, queries and the state's values are turned as
  // the keys and values are.
  void (*attend[std::size(backend::kKvFormats)])(const QueryBlock& block, const KvSpan& span,
                                                 AttentionScratch& scratch,
                                                 const SoftmaxState& state);
  // Adds the next span's state to `state`.
  void (*merge)(const QueryBlock& block, const SoftmaxState& next, const SoftmaxState& state);
  // outputs[row] = values / sum
  void (*finish)(const QueryBlock& block, const SoftmaxState& state, float* const* outputs);

  // Stores a row of `count` values, in blocks of `block`; by format. `values` is changed.
  void (*store[std::size(backend::kKvFormats)])(float* values, uint32_t count, uint32_t block,
                                                std::byte* numbers, uint16_t* scales);
  // backend::tq4_rotate and tq4_rotate_back of each block.
  void (*rotate)(float* values, uint32_t count, uint32_t block);
  void (*rotate_back)(float* values, uint32_t count, uint32_t block);
};

// The fastest kernels of `isa` and those below it that can do this head_dim. `isa` must be one of
// available_isas().
const AttentionKernels& attention_kernels(Isa isa, uint32_t head_dim);

// Defined where they exist, one file each.
extern const AttentionKernels kAttentionScalar;
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionNeon;

}  // namespace nibble::cpu
