#include "cpu/linear/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace nibble::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr int kActivationRows = 8;
  static constexpr bool kSignedQuants = false;
  typedef uint32_t U32 __attribute__((vector_size(64)));
  typedef int32_t I32 __attribute__((vector_size(64)));
  typedef float F32 __attribute__((vector_size(64)));

  static __m128i load_one(const std::byte* bytes) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  }
  // Rows 0, 4, 8 and 12: inserts from memory leave the one port that shuffles alone.
  static __m512i load_four(const std::byte* rows, size_t stride) {
    __m512i v = _mm512_castsi128_si512(load_one(rows));
    v = _mm512_inserti32x4(v, load_one(rows + 4 * stride), 1);
    v = _mm512_inserti32x4(v, load_one(rows + 8 * stride), 2);
    return _mm512_inserti32x4(v, load_one(rows + 12 * stride), 3);
  }

  static void load_columns(const std::byte* rows, size_t stride, U32 (&columns)[4]) {
    const __m512i r0 = load_four(rows, stride);
    const __m512i r1 = load_four(rows + stride, stride);
    const __m512i r2 = load_four(rows + 2 * stride, stride);
    const __m512i r3 = load_four(rows + 3 * stride, stride);
    const __m512i low01 = _mm512_unpacklo_epi32(r0, r1);
    const __m512i low23 = _mm512_unpacklo_epi32(r2, r3);
    const __m512i high01 = _mm512_unpackhi_epi32(r0, r1);
    const __m512i high23 = _mm512_unpackhi_epi32(r2, r3);
    columns[0] = (U32)_mm512_unpacklo_epi64(low01, low23);
    columns[1] = (U32)_mm512_unpackhi_epi64(low01, low23);
    columns[2] = (U32)_mm512_unpacklo_epi64(high01, high23);
    columns[3] = (U32)_mm512_unpackhi_epi64(high01, high23);
  }

  static F32 half_to_float(U32 halves) {
    return (F32)_mm512_cvtph_ps(_mm512_cvtepi32_epi16((__m512i)halves));
  }

  static F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm512_fmadd_ps(a, b, c); }
  static F32 fnma(F32 a, F32 b, F32 c) { return (F32)_mm512_fnmadd_ps(a, b, c); }

  template <int kMaximum, int kSteps>
  static I32 dot(const U32 (&w)[kSteps], const int8_t* x) {
    __m512i sum = _mm512_setzero_si512();
    for (int i = 0; i < kSteps; ++i) {
      int32_t word;
      __builtin_memcpy(&word, x + 4 * i, sizeof word);
      sum = _mm512_dpbusd_epi32(sum, (__m512i)w[i], _mm512_set1_epi32(word));
    }
    return (I32)sum;
  }

  static void fma4(const F32 (&w)[4], const float* x, F32 (&sums)[2]) {
    for (int k = 0; k < 4; ++k) sums[k % 2] = fma(w[k], (F32)_mm512_set1_ps(x[k]), sums[k % 2]);
  }
};

}  // namespace
}  // namespace nibble::cpu

#include "cpu/linear/kernels_generic.h"

namespace nibble::cpu {
const Kernels kAvx512Kernels = kKernels;
}
#endif
