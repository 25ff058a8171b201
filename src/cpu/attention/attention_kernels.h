#pragma once
// The kernels of attention/kernels.h, written once and compiled by each attention_ISA.cc.
//
// Scores are dot products of kTileRows query rows with four keys at a time: enough independent
// sums to hide the latency of multiply_add, few enough for the registers, and each loaded vector
// is used in several products. The weighted sum of values does the same with kTileRows rows and
// kSumVectors vectors of head_dim. Halves are widened as they are loaded, or, when many rows will
// read them, once into a page of floats: the arithmetic is the same.

#include "cpu/attention/kernels.h"
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

// Which keys of a page somebody sees, counted from the page's first.
struct PageRange {
  uint32_t begin;
  uint32_t end;
};

template <uint32_t kRows, class Element>
void score_rows(const float* const* queries,  // [kRows] of [head_dim]
                const Element* keys,          // [kKvPageTokens, head_dim]
                PageRange range, uint32_t head_dim,
                float (*scores)[kKvPageTokens]) {  // [kRows]
  for (uint32_t key = range.begin / 4 * 4; key < range.end; key += 4) {
    SimdFloat sums[kRows][4];
    for (auto& row : sums) {
      for (SimdFloat& s : row) s = SimdFloat::all(0);
    }
    const Element* four = keys + size_t{key} * head_dim;
    for (uint32_t d = 0; d < head_dim; d += SimdFloat::kLanes) {
      SimdFloat k[4];
      for (uint32_t j = 0; j < 4; ++j) k[j] = SimdFloat::load(four + j * head_dim + d);
      for (uint32_t r = 0; r < kRows; ++r) {
        const SimdFloat q = SimdFloat::load(queries[r] + d);
        for (uint32_t j = 0; j < 4; ++j) sums[r][j] = multiply_add(q, k[j], sums[r][j]);
      }
    }
    for (uint32_t r = 0; r < kRows; ++r) store_sum4(sums[r], scores[r] + key);
  }
}

template <class Element>
void score_page(const QueryBlock& block, const Element* keys, PageRange range,
                AttentionScratch& scratch) {
  for_row_tiles<kTileRows>(block.rows, [&](auto rows, uint32_t row) {
    score_rows<decltype(rows)::kCount>(block.queries + row, keys, range, block.head_dim,
                                       scratch.scores + row);
  });
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
inline void sum_values(const AttentionScratch& scratch, uint32_t row,
                       const Element* page_values,  // [kKvPageTokens, head_dim] from the vectors on
                       PageRange range, uint32_t head_dim,
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
      v[j] = SimdFloat::load(page_values + size_t{key} * head_dim + j * SimdFloat::kLanes);
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

template <uint32_t kRows, class Element>
void sum_rows(const AttentionScratch& scratch, uint32_t row, const Element* page_values,
              PageRange range, uint32_t head_dim, float* values) {
  constexpr uint32_t kWide = kSumVectors * SimdFloat::kLanes;
  uint32_t d = 0;
  for (; d + kWide <= head_dim; d += kWide) {
    sum_values<kRows, kSumVectors>(scratch, row, page_values + d, range, head_dim, values + d);
  }
  for (; d < head_dim; d += SimdFloat::kLanes) {
    sum_values<kRows, 1>(scratch, row, page_values + d, range, head_dim, values + d);
  }
}

template <class Element>
void sum_page(const QueryBlock& block, const Element* page_values, PageRange range,
              const AttentionScratch& scratch, const SoftmaxState& state) {
  for_row_tiles<kTileRows>(block.rows, [&](auto rows, uint32_t row) {
    sum_rows<decltype(rows)::kCount>(scratch, row, page_values, range, block.head_dim,
                                     state.values + size_t{row} * block.head_dim);
  });
}

void clear(const QueryBlock& block, const SoftmaxState& state) {
  for (uint32_t row = 0; row < block.rows; ++row) {
    state.maximum[row] = kLowest;
    state.sum[row] = 0;
  }
  const size_t floats = size_t{block.rows} * block.head_dim;
  for (size_t i = 0; i < floats; i += SimdFloat::kLanes) SimdFloat::all(0).store(state.values + i);
}

// The page's seen keys or values as floats: where they lie, or widened into the scratch page.
inline const float* as_floats(const float* page, PageRange, uint32_t, float*) {
  return page;
}
inline const float* as_floats(const uint16_t* page, PageRange range, uint32_t head_dim,
                              float* floats) {
  // Scores are taken four keys at a time.
  const size_t begin = size_t{range.begin / 4 * 4} * head_dim;
  const size_t end = size_t{(range.end + 3) / 4 * 4} * head_dim;
  for (size_t i = begin; i < end; i += SimdFloat::kLanes) {
    SimdFloat::load(page + i).store(floats + i);
  }
  return floats;
}

template <class Element>
void attend(const QueryBlock& block, const KvSpan& span, AttentionScratch& scratch,
            const SoftmaxState& state) {
  clear(block, state);
  for (uint32_t page = 0; page < kSpanPages; ++page) {
    const uint32_t first = span.first + page * kKvPageTokens;
    const uint32_t begin = larger(span.begin, first);
    const uint32_t end = smaller(span.end, first + kKvPageTokens);
    if (begin >= end) continue;
    const PageRange range{begin - first, end - first};
    const Element* keys = reinterpret_cast<const Element*>(span.keys[page]);
    const Element* values = reinterpret_cast<const Element*>(span.values[page]);
    const bool widen = block.rows >= kRowsWorthWidening;

    if (widen) {
      score_page(block, as_floats(keys, range, block.head_dim, scratch.page), range, scratch);
    } else {
      score_page(block, keys, range, scratch);
    }
    for (uint32_t row = 0; row < block.rows; ++row) weigh_page(block, row, first, scratch, state);
    if (widen) {
      sum_page(block, as_floats(values, range, block.head_dim, scratch.page), range, scratch,
               state);
    } else {
      sum_page(block, values, range, scratch, state);
    }
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

constexpr AttentionKernels kAttentionKernels{SimdFloat::kLanes, clear, attend<float>,
                                             attend<uint16_t>,  merge, finish};

}  // namespace
}  // namespace nibble::cpu
