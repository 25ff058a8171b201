#pragma once
// The kernels of attention/kernels.h, written once and compiled by each attention_ISA.cc.
//
// Scores are dot products of kTileRows query rows with four keys at a time: enough independent
// sums to hide the latency of multiply_add, few enough for the registers, and each loaded vector
// is used in several products. The weighted sum of values does the same with kTileRows rows and
// kSumVectors vectors of head_dim. Floats are read where they lie, and so are halves, which are
// widened as they are loaded, until many rows would read them; other formats become floats a tile
// at a time (AttentionScratch). The arithmetic is the same.

#include "cpu/attention/kernels.h"
#include "cpu/attention/kv_rows.h"
#include "cpu/simd.h"

namespace nibble::cpu {
namespace {

using backend::kKvPageTokens;

constexpr bool kFewRegisters = SimdFloat::kLanes == 8;  // AVX2 has 16, the others 32
constexpr uint32_t kTileRows = kFewRegisters ? 2 : 4;
constexpr uint32_t kSumVectors = 4;
constexpr uint32_t kRowsWorthWidening = 9;

constexpr float kLowest = -0x1.fffffep127f;

inline uint32_t smaller(uint32_t a, uint32_t b) {
  return a < b ? a : b;
}
inline uint32_t larger(uint32_t a, uint32_t b) {
  return a > b ? a : b;
}

template <uint32_t kRows>
struct RowTile {
  static constexpr uint32_t kCount = kRows;
};

// Calls body(RowTile<n>{}, row) for tiles of kRows rows and one of those that are left.
template <uint32_t kRows, class Body>
inline void for_row_tiles(uint32_t rows, const Body& body, uint32_t row = 0) {
  for (; row + kRows <= rows; row += kRows) body(RowTile<kRows>{}, row);
  if constexpr (kRows > 1) {
    if (row < rows) for_row_tiles<kRows - 1>(rows, body, row);
  }
}

// Whether the format's rows are read where they lie. Widening halves costs less than reading twice
// as many bytes, until many rows share it.
template <class Rows>
inline bool reads_plainly(const QueryBlock& block) {
  return sizeof(typename Rows::Element) == sizeof(float) || block.rows < kRowsWorthWidening;
}

// Which keys of a page somebody sees, counted from the page's first.
struct PageRange {
  uint32_t begin;
  uint32_t end;
};

// Dot products with the keys of a tile, `stride` elements apart.
template <uint32_t kRows, class Element>
inline void score_rows(const float* const* queries,  // [kRows] of [head_dim]
                       const Element* keys,          // [kTileKeys, stride]
                       size_t stride, uint32_t key, uint32_t head_dim,
                       float (*scores)[kKvPageTokens]) {  // [kRows]
  SimdFloat sums[kRows][kTileKeys];
  for (auto& row : sums) {
    for (SimdFloat& s : row) s = SimdFloat::all(0);
  }
  for (uint32_t d = 0; d < head_dim; d += SimdFloat::kLanes) {
    SimdFloat k[kTileKeys];
    for (uint32_t j = 0; j < kTileKeys; ++j) k[j] = SimdFloat::load(keys + j * stride + d);
    for (uint32_t r = 0; r < kRows; ++r) {
      const SimdFloat q = SimdFloat::load(queries[r] + d);
      for (uint32_t j = 0; j < kTileKeys; ++j) sums[r][j] = multiply_add(q, k[j], sums[r][j]);
    }
  }
  for (uint32_t r = 0; r < kRows; ++r) store_sum4(sums[r], scores[r] + key);
}

template <class Element>
inline void score_tile(const QueryBlock& block, const Element* keys, size_t stride, uint32_t key,
                       AttentionScratch& scratch) {
  for_row_tiles<kTileRows>(block.rows, [&](auto rows, uint32_t row) {
    score_rows<decltype(rows)::kCount>(block.queries + row, keys, stride, key, block.head_dim,
                                       scratch.scores + row);
  });
}

template <class Rows>
void score_page(const QueryBlock& block, const PageRows& page, PageRange range,
                AttentionScratch& scratch) {
  for (uint32_t key = range.begin / kTileKeys * kTileKeys; key < range.end; key += kTileKeys) {
    if constexpr (Rows::kPlain) {
      if (reads_plainly<Rows>(block)) {
        using Element = typename Rows::Element;
        score_tile(block, page.row<Element>(key), page.row_bytes / sizeof(Element), key, scratch);
        continue;
      }
    }
    for (uint32_t j = 0; j < kTileKeys; ++j) {
      Rows::decode(page, key + j, 0, block.head_dim, scratch.tile + j * block.head_dim);
    }
    score_tile(block, scratch.tile, block.head_dim, key, scratch);
  }
}

// Turns a row's scores into exp(scale * score - maximum), 0 where the row does not look.
void weigh_page(const QueryBlock& block, uint32_t row, uint32_t page_first,
                AttentionScratch& scratch, const SoftmaxState& state) {
  float* scores = scratch.scores[row];
  const uint32_t page_end = page_first + kKvPageTokens;
  const uint32_t begin = smaller(larger(block.begin[row], page_first), page_end) - page_first;
  const uint32_t end = larger(smaller(block.end[row], page_end), page_first) - page_first;

  for (uint32_t key = 0; key < kKvPageTokens; key += SimdFloat::kLanes) {
    (SimdFloat::load(scores + key) * SimdFloat::all(block.scale)).store(scores + key);
  }
  for (uint32_t key = 0; key < begin; ++key) scores[key] = -__builtin_inff();
  for (uint32_t key = end; key < kKvPageTokens; ++key) scores[key] = -__builtin_inff();

  SimdFloat highest = SimdFloat::all(state.maximum[row]);
  for (uint32_t key = 0; key < kKvPageTokens; key += SimdFloat::kLanes) {
    highest = max(highest, SimdFloat::load(scores + key));
  }
  const float maximum = largest(highest);

  SimdFloat total = SimdFloat::all(0);
  for (uint32_t key = 0; key < kKvPageTokens; key += SimdFloat::kLanes) {
    const SimdFloat weight = exponential(SimdFloat::load(scores + key) - SimdFloat::all(maximum));
    weight.store(scores + key);
    total = total + weight;
  }
  const float decay = exponential(ScalarFloat{state.maximum[row] - maximum}).v;
  state.sum[row] = state.sum[row] * decay + sum(total);
  state.maximum[row] = maximum;
  scratch.decay[row] = decay;
}

// values = values * decay + weights V, for kVectors vectors of head_dim.
template <uint32_t kRows, uint32_t kVectors, class Element>
inline void sum_vectors(const AttentionScratch& scratch, uint32_t row,
                        const Element* page_values,  // [kKvPageTokens, stride] from the vectors on
                        size_t stride, PageRange range, uint32_t head_dim,
                        float* values) {  // [kRows, head_dim] from the vectors on
  SimdFloat sums[kRows][kVectors];
  for (uint32_t r = 0; r < kRows; ++r) {
    const SimdFloat decay = SimdFloat::all(scratch.decay[row + r]);
    for (uint32_t j = 0; j < kVectors; ++j) {
      sums[r][j] = SimdFloat::load(values + r * head_dim + j * SimdFloat::kLanes) * decay;
    }
  }
  for (uint32_t key = range.begin; key < range.end; ++key) {
    SimdFloat v[kVectors];
    for (uint32_t j = 0; j < kVectors; ++j) {
      v[j] = SimdFloat::load(page_values + key * stride + j * SimdFloat::kLanes);
    }
    for (uint32_t r = 0; r < kRows; ++r) {
      const SimdFloat weight = SimdFloat::all(scratch.scores[row + r][key]);
      for (uint32_t j = 0; j < kVectors; ++j) {
        sums[r][j] = multiply_add(weight, v[j], sums[r][j]);
      }
    }
  }
  for (uint32_t r = 0; r < kRows; ++r) {
    for (uint32_t j = 0; j < kVectors; ++j) {
      sums[r][j].store(values + r * head_dim + j * SimdFloat::kLanes);
    }
  }
}

// Dimensions [first, first + dims) of all rows.
template <class Element>
inline void sum_tile(const QueryBlock& block, const Element* page_values, size_t stride,
                     PageRange range, uint32_t first, uint32_t dims,
                     const AttentionScratch& scratch, const SoftmaxState& state) {
  constexpr uint32_t kWide = kSumVectors * SimdFloat::kLanes;
  for_row_tiles<kTileRows>(block.rows, [&](auto rows, uint32_t row) {
    constexpr uint32_t kRows = decltype(rows)::kCount;
    float* values = state.values + size_t{row} * block.head_dim + first;
    uint32_t d = 0;
    for (; d + kWide <= dims; d += kWide) {
      sum_vectors<kRows, kSumVectors>(scratch, row, page_values + d, stride, range, block.head_dim,
                                      values + d);
    }
    for (; d < dims; d += SimdFloat::kLanes) {
      sum_vectors<kRows, 1>(scratch, row, page_values + d, stride, range, block.head_dim,
                            values + d);
    }
  });
}

template <class Rows>
void sum_page(const QueryBlock& block, const PageRows& page, PageRange range,
              AttentionScratch& scratch, const SoftmaxState& state) {
  if constexpr (Rows::kPlain) {
    if (reads_plainly<Rows>(block)) {
      using Element = typename Rows::Element;
      sum_tile(block, page.row<Element>(0), page.row_bytes / sizeof(Element), range, 0,
               block.head_dim, scratch, state);
      return;
    }
  }
  for (uint32_t first = 0; first < block.head_dim; first += kTileDims) {
    const uint32_t dims = smaller(kTileDims, block.head_dim - first);
    for (uint32_t key = range.begin; key < range.end; ++key) {
      Rows::decode(page, key, first, dims, scratch.tile + size_t{key} * kTileDims);
    }
    sum_tile(block, scratch.tile, kTileDims, range, first, dims, scratch, state);
  }
}

void clear(const QueryBlock& block, const SoftmaxState& state) {
  for (uint32_t row = 0; row < block.rows; ++row) {
    state.maximum[row] = kLowest;
    state.sum[row] = 0;
  }
  const size_t floats = size_t{block.rows} * block.head_dim;
  for (size_t i = 0; i < floats; i += SimdFloat::kLanes) SimdFloat::all(0).store(state.values + i);
}

inline PageRows page_rows(const KvSpan& span, const KvSpan::Rows& rows, uint32_t page) {
  return {rows.numbers[page], rows.scales[page], span.row_bytes, span.row_scales, span.block};
}

template <class Rows>
void attend(const QueryBlock& block, const KvSpan& span, AttentionScratch& scratch,
            const SoftmaxState& state) {
  clear(block, state);
  for (uint32_t page = 0; page < kSpanPages; ++page) {
    const uint32_t first = span.first + page * kKvPageTokens;
    const uint32_t begin = larger(span.begin, first);
    const uint32_t end = smaller(span.end, first + kKvPageTokens);
    if (begin >= end) continue;
    const PageRange range{begin - first, end - first};
    score_page<Rows>(block, page_rows(span, span.keys, page), range, scratch);
    for (uint32_t row = 0; row < block.rows; ++row) weigh_page(block, row, first, scratch, state);
    sum_page<Rows>(block, page_rows(span, span.values, page), range, scratch, state);
  }
}

void merge(const QueryBlock& block, const SoftmaxState& next, const SoftmaxState& state) {
  for (uint32_t row = 0; row < block.rows; ++row) {
    const ScalarFloat before{state.maximum[row]}, after{next.maximum[row]};
    const ScalarFloat maximum = max(before, after);
    const float keep = exponential(before - maximum).v;
    const float add = exponential(after - maximum).v;
    state.maximum[row] = maximum.v;
    state.sum[row] = state.sum[row] * keep + next.sum[row] * add;
    float* values = state.values + size_t{row} * block.head_dim;
    const float* next_values = next.values + size_t{row} * block.head_dim;
    for (uint32_t d = 0; d < block.head_dim; d += SimdFloat::kLanes) {
      const SimdFloat kept = SimdFloat::load(values + d) * SimdFloat::all(keep);
      multiply_add(SimdFloat::load(next_values + d), SimdFloat::all(add), kept).store(values + d);
    }
  }
}

void finish(const QueryBlock& block, const SoftmaxState& state, float* const* outputs) {
  for (uint32_t row = 0; row < block.rows; ++row) {
    const float* values = state.values + size_t{row} * block.head_dim;
    const SimdFloat sum = SimdFloat::all(state.sum[row]);
    for (uint32_t d = 0; d < block.head_dim; d += SimdFloat::kLanes) {
      (SimdFloat::load(values + d) / sum).store(outputs[row] + d);
    }
  }
}

constexpr AttentionKernels kAttentionKernels{
    SimdFloat::kLanes,
    clear,
    {attend<PlainRows<float>>, attend<PlainRows<uint16_t>>, attend<Q8Rows>, attend<Tq4Rows>},
    merge,
    finish,
    {store_plain<float>, store_plain<uint16_t>, store_q8, store_tq4},
    rotate,
    rotate_back};

}  // namespace
}  // namespace nibble::cpu
