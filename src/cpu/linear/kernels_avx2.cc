#include "cpu/linear/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace nibble::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr int kActivationRows = 4;
  static constexpr bool kSignedQuants = true;
  typedef uint32_t U32 __attribute__((vector_size(32)));
  typedef int32_t I32 __attribute__((vector_size(32)));
  typedef float F32 __attribute__((vector_size(32)));

  static __m256i load_two(const std::byte* low, const std::byte* high) {
    return _mm256_inserti128_si256(
        _mm256_castsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(low))),
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)), 1);
  }

  static void load_columns(const std::byte* rows, size_t stride, U32 (&columns)[4]) {
    const std::byte* high = rows + 4 * stride;
    const __m256i r0 = load_two(rows, high);
    const __m256i r1 = load_two(rows + stride, high + stride);
    const __m256i r2 = load_two(rows + 2 * stride, high + 2 * stride);
    const __m256i r3 = load_two(rows + 3 * stride, high + 3 * stride);
    const __m256i low01 = _mm256_unpacklo_epi32(r0, r1);
    const __m256i low23 = _mm256_unpacklo_epi32(r2, r3);
    const __m256i high01 = _mm256_unpackhi_epi32(r0, r1);
    const __m256i high23 = _mm256_unpackhi_epi32(r2, r3);
    columns[0] = (U32)_mm256_unpacklo_epi64(low01, low23);
    columns[1] = (U32)_mm256_unpackhi_epi64(low01, low23);
    columns[2] = (U32)_mm256_unpacklo_epi64(high01, high23);
    columns[3] = (U32)_mm256_unpackhi_epi64(high01, high23);
  }

  static F32 half_to_float(U32 halves) {
    const __m256i packed = _mm256_packus_epi32((__m256i)halves, (__m256i)halves);
    const __m256i ordered = _mm256_permute4x64_epi64(packed, 0x08);
    return (F32)_mm256_cvtph_ps(_mm256_castsi256_si128(ordered));
  }

  static F32 fma(F32 a, F32 b, F32 c) { return (F32)_mm256_fmadd_ps(a, b, c); }
  static F32 fnma(F32 a, F32 b, F32 c) { return (F32)_mm256_fnmadd_ps(a, b, c); }

  static __m256i broadcast(const int8_t* x) {
    int32_t word;
    __builtin_memcpy(&word, x, sizeof word);
    return _mm256_set1_epi32(word);
  }

  // maddubs adds pairs of products to 16 bits, saturating: sums of small weights are kept there
  // as long as they fit, weights with a sign lend it to the activations.
  template <int kMaximum, int kSteps>
  static I32 dot(const U32 (&w)[kSteps], const int8_t* x) {
    constexpr int kFit = 32767 / (2 * 127 * kMaximum);  // steps that fit into 16 bits
    static_assert(kFit >= 1);
    constexpr int kRun = kFit < kSteps ? kFit : kSteps;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i sum = _mm256_setzero_si256();
    for (int i = 0; i < kSteps; i += kRun) {
      __m256i run = _mm256_setzero_si256();
      for (int j = i; j < i + kRun && j < kSteps; ++j) {
        run = _mm256_add_epi16(run, products<kMaximum>((__m256i)w[j], broadcast(x + 4 * j)));
      }
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(run, ones));
    }
    return (I32)sum;
  }

  template <int kMaximum>
  static __m256i products(__m256i w, __m256i x) {
    if constexpr (kMaximum == 128) {
      return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w));
    } else {
      return _mm256_maddubs_epi16(w, x);
    }
  }

  static void fma4(const F32 (&w)[4], const float* x, F32 (&sums)[2]) {
    for (int k = 0; k < 4; ++k) sums[k % 2] = fma(w[k], (F32)_mm256_set1_ps(x[k]), sums[k % 2]);
  }
};

}  // namespace
}  // namespace nibble::cpu

#include "cpu/linear/kernels_generic.h"

namespace nibble::cpu {
const Kernels kAvx2Kernels = kKernels;
}
#endif
