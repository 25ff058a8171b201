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

#include "backend/kv_format.h"
#include "cpu/isa.h"

namespace nibble::cpu {

inline constexpr uint32_t kSpanPages = 16;
inline constexpr uint32_t kSpanTokens = kSpanPages * backend::kKvPageTokens;

// Query rows that share the reads of keys and values. Their states and queries and a page of
// floats fit a second-level cache of 256 KiB at head_dim 512.
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
  const std::byte* keys[kSpanPages];    // [kKvPageTokens, head_dim] each
  const std::byte* values[kSpanPages];  // the same
};

// Softmax of each row over the keys so far, not yet divided by its sum. An empty one is 0 / 0.
struct SoftmaxState {
  float* maximum;  // [rows] of the scores
  float* sum;      // [rows] of exp(score - maximum)
  float* values;   // [rows, head_dim], values weighted with exp(score - maximum)
};

struct AttentionScratch {
  float* page;                                          // [kKvPageTokens, head_dim]
  float scores[kMaxBlockRows][backend::kKvPageTokens];  // then their exponentials
  float decay[kMaxBlockRows];  // what the page's new maximum makes of earlier sums
};

struct AttentionKernels {
  uint32_t lanes;  // head_dim must be a multiple of it

  void (*clear)(const QueryBlock& block, const SoftmaxState& state);
  // Sets `state` to the span's.
  void (*attend_f32)(const QueryBlock& block, const KvSpan& span, AttentionScratch& scratch,
                     const SoftmaxState& state);
  void (*attend_f16)(const QueryBlock& block, const KvSpan& span, AttentionScratch& scratch,
                     const SoftmaxState& state);
  // Adds the next span's state to `state`.
  void (*merge)(const QueryBlock& block, const SoftmaxState& next, const SoftmaxState& state);
  // outputs[row] = values / sum
  void (*finish)(const QueryBlock& block, const SoftmaxState& state, float* const* outputs);
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
