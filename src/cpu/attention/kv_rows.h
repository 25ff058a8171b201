#pragma once
// Rows of keys and values in their formats, as attention_kernels.h needs them: to floats a piece
// at a time, and from floats when they are stored. docs/formats/kv-*.md say what the bytes mean.

#include "backend/kv_tq4.h"
#include "cpu/attention/kernels.h"
#include "cpu/simd.h"

namespace nibble::cpu {
namespace {

using backend::kTq4Boundaries;
using backend::kTq4Magnitudes;
using backend::kTq4Signs;

constexpr uint32_t kQ8Block = 32;
constexpr uint32_t kLargestTq4Block = 128;
constexpr uint32_t kPiece = 32;  // values that never lie in two blocks

// The rows of one page.
struct PageRows {
  const std::byte* numbers;
  const uint16_t* scales;
  uint32_t row_bytes, row_scales, block;

  template <class Element>
  const Element* row(uint32_t key) const {
    return reinterpret_cast<const Element*>(numbers + size_t{key} * row_bytes);
  }
  float scale(uint32_t key, uint32_t value) const {
    return half_to_float(scales[size_t{key} * row_scales + value / block]);
  }
};

// ---- tq4: eight values in a word

constexpr int32_t kIndexShifts[16] = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
// To the left, until the sign is the highest bit.
constexpr int32_t kSignShifts[16] = {24, 16, 8, 0, 28, 20, 12, 4, 24, 16, 8, 0, 28, 20, 12, 4};

// A block's levels, and the vectors that its words stand for.
struct Tq4Levels {
#if NIBBLE_SIMD_LANES == 16
  __m512 magnitudes;  // twice: an index's fourth bit is another value's sign

  explicit Tq4Levels(float scale) {
    const __m256 half =
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kTq4Magnitudes)));
    magnitudes = _mm512_mul_ps(_mm512_insertf32x8(_mm512_castps256_ps512(half), half, 1),
                               _mm512_set1_ps(scale));
  }
  SimdFloat load(const std::byte* words, uint32_t first) const {
    const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(words + first / 2));
    const __m512i word = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_broadcastd_epi32(two)),
                                            _mm256_broadcastd_epi32(_mm_srli_epi64(two, 32)), 1);
    const __m512i index = _mm512_srlv_epi32(word, _mm512_loadu_si512(kIndexShifts));
    const __m512i sign = _mm512_and_si512(_mm512_sllv_epi32(word, _mm512_loadu_si512(kSignShifts)),
                                          _mm512_set1_epi32(INT32_MIN));
    return {_mm512_xor_ps(_mm512_permutexvar_ps(index, magnitudes), _mm512_castsi512_ps(sign))};
  }
#elif NIBBLE_SIMD_LANES == 8
  __m256 magnitudes;

  explicit Tq4Levels(float scale)
      : magnitudes((SimdFloat::load(kTq4Magnitudes) * SimdFloat::all(scale)).v) {}
  SimdFloat load(const std::byte* words, uint32_t first) const {
    int32_t bits;
    __builtin_memcpy(&bits, words + first / 2, sizeof bits);
    const auto shifts = [](const int32_t* by) {
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(by));
    };
    const __m256i word = _mm256_set1_epi32(bits);
    const __m256i index = _mm256_srlv_epi32(word, shifts(kIndexShifts));
    const __m256i sign = _mm256_and_si256(_mm256_sllv_epi32(word, shifts(kSignShifts)),
                                          _mm256_set1_epi32(INT32_MIN));
    return {_mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, index), _mm256_castsi256_ps(sign))};
  }
#elif NIBBLE_SIMD_LANES == 4
  uint8x16x2_t magnitudes;

  explicit Tq4Levels(float scale) {
    const SimdFloat all = SimdFloat::all(scale);
    magnitudes = {vreinterpretq_u8_f32((SimdFloat::load(kTq4Magnitudes) * all).v),
                  vreinterpretq_u8_f32((SimdFloat::load(kTq4Magnitudes + 4) * all).v)};
  }
  SimdFloat load(const std::byte* words, uint32_t first) const {
    uint32_t bits;
    __builtin_memcpy(&bits, words + first / 8 * 4, sizeof bits);
    const uint32x4_t word = vdupq_n_u32(bits);
    const uint32x4_t index =
        vandq_u32(vshlq_u32(word, vnegq_s32(vld1q_s32(kIndexShifts + first % 8))), vdupq_n_u32(7));
    const uint32x4_t sign =
        vandq_u32(vshlq_u32(word, vld1q_s32(kSignShifts + first % 8)), vdupq_n_u32(0x80000000));
    // The four bytes of the float with that index.
    const uint32x4_t bytes = vmlaq_n_u32(vdupq_n_u32(0x03020100), index, 0x04040404);
    const uint8x16_t found = vqtbl2q_u8(magnitudes, vreinterpretq_u8_u32(bytes));
    return {vreinterpretq_f32_u32(veorq_u32(vreinterpretq_u32_u8(found), sign))};
  }
#else
  float magnitudes[8];

  explicit Tq4Levels(float scale) {
    for (uint32_t i = 0; i < 8; ++i) magnitudes[i] = half_to_float(kTq4Magnitudes[i]) * scale;
  }
  SimdFloat load(const std::byte* words, uint32_t first) const {
    uint32_t word;
    __builtin_memcpy(&word, words + first / 8 * 4, sizeof word);
    const float magnitude = magnitudes[word >> kIndexShifts[first % 8] & 7];
    return {(word << kSignShifts[first % 8] & 0x80000000) != 0 ? -magnitude : magnitude};
  }
#endif
};

// ---- formats to floats: values [first, first + count) of a key; multiples of kPiece where there
// are blocks

template <class T>
struct PlainRows {
  using Element = T;
  static constexpr bool kPlain = true;  // no scales, and loads of floats as they are
  static void decode(const PageRows& page, uint32_t key, uint32_t first, uint32_t count,
                     float* to) {
    const Element* from = page.row<Element>(key) + first;
    for (uint32_t i = 0; i < count; i += SimdFloat::kLanes) SimdFloat::load(from + i).store(to + i);
  }
};

struct Q8Rows {
  static constexpr bool kPlain = false;
  static void decode(const PageRows& page, uint32_t key, uint32_t first, uint32_t count,
                     float* to) {
    const int8_t* from = page.row<int8_t>(key) + first;
    for (uint32_t i = 0; i < count; i += kPiece) {
      const SimdFloat scale = SimdFloat::all(page.scale(key, first + i));
      for (uint32_t j = i; j < i + kPiece; j += SimdFloat::kLanes) {
        (SimdFloat::load(from + j) * scale).store(to + j);
      }
    }
  }
};

struct Tq4Rows {
  static constexpr bool kPlain = false;
  static void decode(const PageRows& page, uint32_t key, uint32_t first, uint32_t count,
                     float* to) {
    const std::byte* words = page.row<std::byte>(key) + first / 2;
    for (uint32_t i = 0; i < count; i += kPiece) {
      const Tq4Levels levels(page.scale(key, first + i));
      for (uint32_t j = i; j < i + kPiece; j += SimdFloat::kLanes) {
        levels.load(words, j).store(to + j);
      }
    }
  }
};

// ---- the rotation

struct SignTable {
  float of[kLargestTq4Block];
};
constexpr SignTable make_sign_table() {
  SignTable table{};
  for (uint32_t i = 0; i < kLargestTq4Block; ++i) {
    table.of[i] = (kTq4Signs[i / 32] >> i % 32 & 1) != 0 ? -1.0f : 1.0f;
  }
  return table;
}
constexpr SignTable kSignTable = make_sign_table();

// to = from * signs * factor
inline void change_signs(const float* from, uint32_t block, float factor, float* to) {
  for (uint32_t i = 0; i < block; i += SimdFloat::kLanes) {
    (SimdFloat::load(from + i) * SimdFloat::load(kSignTable.of + i) * SimdFloat::all(factor))
        .store(to + i);
  }
}

// Sums and differences of lanes that kDistance lie apart.
template <uint32_t kDistance>
inline SimdFloat butterfly_lanes(SimdFloat a) {
  if constexpr (kDistance < SimdFloat::kLanes) {
    float signs[SimdFloat::kLanes];
    for (uint32_t i = 0; i < SimdFloat::kLanes; ++i) signs[i] = (i & kDistance) != 0 ? -1 : 1;
    a = butterfly_lanes<2 * kDistance>(
        multiply_add(a, SimdFloat::load(signs), exchange<kDistance>(a)));
  }
  return a;
}

inline void walsh_hadamard(float* values, uint32_t block) {
  for (uint32_t i = 0; i < block; i += SimdFloat::kLanes) {
    butterfly_lanes<1>(SimdFloat::load(values + i)).store(values + i);
  }
  for (uint32_t distance = SimdFloat::kLanes; distance < block; distance *= 2) {
    for (uint32_t first = 0; first < block; first += 2 * distance) {
      for (uint32_t i = first; i < first + distance; i += SimdFloat::kLanes) {
        const SimdFloat low = SimdFloat::load(values + i);
        const SimdFloat high = SimdFloat::load(values + i + distance);
        (low + high).store(values + i);
        (low - high).store(values + i + distance);
      }
    }
  }
}

inline float root_of_inverse(uint32_t block) {
  return 1 / __builtin_sqrtf(float(block));
}

void rotate(float* values, uint32_t count, uint32_t block) {
  for (uint32_t first = 0; first < count; first += block) {
    change_signs(values + first, block, root_of_inverse(block), values + first);
    walsh_hadamard(values + first, block);
  }
}

void rotate_back(float* values, uint32_t count, uint32_t block) {
  for (uint32_t first = 0; first < count; first += block) {
    walsh_hadamard(values + first, block);
    change_signs(values + first, block, root_of_inverse(block), values + first);
  }
}

// ---- floats to formats

template <class Element>
void store_plain(float* values, uint32_t count, uint32_t, std::byte* numbers, uint16_t*) {
  Element* to = reinterpret_cast<Element*>(numbers);
  for (uint32_t i = 0; i < count; i += SimdFloat::kLanes) SimdFloat::load(values + i).store(to + i);
}

inline SimdFloat absolute(SimdFloat x) {
  return max(x, SimdFloat::all(0) - x);
}

void store_q8(float* values, uint32_t count, uint32_t, std::byte* numbers, uint16_t* scales) {
  for (uint32_t first = 0; first < count; first += kQ8Block) {
    float* block = values + first;
    SimdFloat highest = SimdFloat::all(0), nan = SimdFloat::all(0);
    for (uint32_t i = 0; i < kQ8Block; i += SimdFloat::kLanes) {
      const SimdFloat x = SimdFloat::load(block + i);
      highest = max(highest, absolute(x));
      nan = multiply_add(x, SimdFloat::all(0), nan);  // which a maximum may lose
    }
    scales[first / kQ8Block] = float_to_half(largest(highest) / 127 + sum(nan));
    const float scale = half_to_float(scales[first / kQ8Block]);
    const SimdFloat inverse = SimdFloat::all(scale > 0 ? 1 / scale : 0);
    for (uint32_t i = 0; i < kQ8Block; i += SimdFloat::kLanes) {
      const SimdFloat x = SimdFloat::load(block + i) * inverse;
      const SimdFloat inside = min(SimdFloat::all(127), max(SimdFloat::all(-127), x));
      (inside + SimdFloat::all(kIntegerShift)).store(block + i);
    }
    for (uint32_t i = 0; i < kQ8Block; ++i) {
      numbers[first + i] = std::byte(__builtin_bit_cast(uint32_t, block[i]));
    }
  }
}

void store_tq4(float* values, uint32_t count, uint32_t block, std::byte* numbers,
               uint16_t* scales) {
  rotate(values, count, block);
  for (uint32_t first = 0; first < count; first += block) {
    const float* rotated = values + first;
    SimdFloat sums = SimdFloat::all(0);
    for (uint32_t i = 0; i < block; i += SimdFloat::kLanes) {
      const SimdFloat x = SimdFloat::load(rotated + i);
      sums = multiply_add(x, x, sums);
    }
    const float squares = sum(sums);
    const SimdFloat to_unit =
        SimdFloat::all(squares > 0 ? __builtin_sqrtf(float(block) / squares) : 0);

    float indices[kLargestTq4Block];
    SimdFloat code_sums = SimdFloat::all(0);
    for (uint32_t i = 0; i < block; i += SimdFloat::kLanes) {
      const SimdFloat unit = absolute(SimdFloat::load(rotated + i) * to_unit);
      SimdFloat index = SimdFloat::all(0);
      SimdFloat magnitude = SimdFloat::all(half_to_float(kTq4Magnitudes[0]));
      for (uint32_t level = 1; level < 8; ++level) {
        const SimdFloat boundary = SimdFloat::all(kTq4Boundaries[level - 1]);
        const SimdFloat next = SimdFloat::all(half_to_float(kTq4Magnitudes[level]));
        index = select_less(unit, boundary, index, SimdFloat::all(float(level)));
        magnitude = select_less(unit, boundary, magnitude, next);
      }
      index.store(indices + i);
      code_sums = multiply_add(magnitude, magnitude, code_sums);
    }
    scales[first / block] = float_to_half(__builtin_sqrtf(squares / sum(code_sums)));

    for (uint32_t word_first = 0; word_first < block; word_first += 8) {
      uint32_t word = 0;
      for (uint32_t i = 0; i < 8; ++i) {
        const uint32_t sign = __builtin_bit_cast(uint32_t, rotated[word_first + i]) & 0x80000000;
        word |= uint32_t(indices[word_first + i]) << kIndexShifts[i] | sign >> kSignShifts[i];
      }
      __builtin_memcpy(numbers + (first + word_first) / 2, &word, sizeof word);
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
