#pragma once
// A vector of NIBBLE_SIMD_LANES floats. Kernels are written once against it and compiled once per
// instruction set (elementwise_avx2.cc, ...), which defines the number of lanes.
//
// Everything here has internal linkage: code built for AVX-512 must never be what the linker picks
// for another file. For the same reason files that include this call no inline function of another
// header, the standard library's included.

#include <cstddef>
#include <cstdint>

#if !defined(NIBBLE_SIMD_LANES)
#error "define NIBBLE_SIMD_LANES: 1 (scalar), 4 (NEON), 8 (AVX2) or 16 (AVX-512)"
#elif NIBBLE_SIMD_LANES == 1
#include "base/half.h"
#elif NIBBLE_SIMD_LANES == 4
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

namespace nibble::cpu {
namespace {

inline float half_to_float(uint16_t half) {
#if NIBBLE_SIMD_LANES == 1
  return f16_to_f32(half);
#elif NIBBLE_SIMD_LANES == 4
  return float(__builtin_bit_cast(__fp16, half));
#else
  return _cvtsh_ss(half);
#endif
}

inline uint16_t float_to_half(float value) {
#if NIBBLE_SIMD_LANES == 1
  return f32_to_f16(value);
#elif NIBBLE_SIMD_LANES == 4
  return __builtin_bit_cast(uint16_t, __fp16(value));
#else
  return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#endif
}

// One float with the interface of a vector: the tails of rows, and machines without vectors.
// The operations that are not obvious:
//   max(a, b), min(a, b)  b where either is NaN, so bounds go first and NaN passes through
//   multiply_add          a * b + c, with one rounding where the machine can
//   select_less(a, b, x, y)  a < b ? x : y
//   power_of_two(n)       2^n for an integral n in [-126, 127] given as n + kIntegerShift
//   sum, largest          over the lanes
//   store_sum4            the sums of four vectors, each in the same fixed order
//   exchange<n>           lanes i and i ^ n change places
struct ScalarFloat {
  static constexpr uint32_t kLanes = 1;
  float v;

  static ScalarFloat load(const float* p) { return {*p}; }
  static ScalarFloat load(const uint16_t* half) { return {half_to_float(*half)}; }
  static ScalarFloat load(const int8_t* p) { return {float(*p)}; }
  static ScalarFloat all(float x) { return {x}; }
  void store(float* p) const { *p = v; }
  void store(uint16_t* half) const { *half = float_to_half(v); }

  friend ScalarFloat operator+(ScalarFloat a, ScalarFloat b) { return {a.v + b.v}; }
  friend ScalarFloat operator-(ScalarFloat a, ScalarFloat b) { return {a.v - b.v}; }
  friend ScalarFloat operator*(ScalarFloat a, ScalarFloat b) { return {a.v * b.v}; }
  friend ScalarFloat operator/(ScalarFloat a, ScalarFloat b) { return {a.v / b.v}; }
  friend ScalarFloat max(ScalarFloat a, ScalarFloat b) { return {a.v > b.v ? a.v : b.v}; }
  friend ScalarFloat min(ScalarFloat a, ScalarFloat b) { return {a.v < b.v ? a.v : b.v}; }
  friend ScalarFloat multiply_add(ScalarFloat a, ScalarFloat b, ScalarFloat c) {
    return {a.v * b.v + c.v};
  }
  friend ScalarFloat select_less(ScalarFloat a, ScalarFloat b, ScalarFloat x, ScalarFloat y) {
    return a.v < b.v ? x : y;
  }
  friend ScalarFloat power_of_two(ScalarFloat n) {
    return {__builtin_bit_cast(float, (__builtin_bit_cast(uint32_t, n.v) << 23) + 0x3f800000u)};
  }
  friend float sum(ScalarFloat a) { return a.v; }
  friend float largest(ScalarFloat a) { return a.v; }
  friend void store_sum4(const ScalarFloat (&a)[4], float* out) {
    for (int i = 0; i < 4; ++i) out[i] = a[i].v;
  }
};

#if NIBBLE_SIMD_LANES >= 8

// The sums of the lanes of four vectors.
inline __m128 sum4_lanes(__m128 a, __m128 b, __m128 c, __m128 d) {
  const __m128 ab = _mm_add_ps(_mm_unpacklo_ps(a, b), _mm_unpackhi_ps(a, b));  // a02 b02 a13 b13
  const __m128 cd = _mm_add_ps(_mm_unpacklo_ps(c, d), _mm_unpackhi_ps(c, d));
  return _mm_add_ps(_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
}

inline __m128 halves_sum(__m256 a) {
  return _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
}

inline float largest_lane(__m128 a) {
  a = _mm_max_ps(a, _mm_movehl_ps(a, a));
  return _mm_cvtss_f32(_mm_max_ss(a, _mm_shuffle_ps(a, a, 1)));
}

#endif

#if NIBBLE_SIMD_LANES == 16

struct SimdFloat {
  static constexpr uint32_t kLanes = 16;
  __m512 v;

  static SimdFloat load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static SimdFloat load(const uint16_t* halves) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(halves)))};
  }
  static SimdFloat load(const int8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
  }
  static SimdFloat all(float x) { return {_mm512_set1_ps(x)}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(uint16_t* halves) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(halves),
                        _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }

  friend SimdFloat operator+(SimdFloat a, SimdFloat b) { return {_mm512_add_ps(a.v, b.v)}; }
  friend SimdFloat operator-(SimdFloat a, SimdFloat b) { return {_mm512_sub_ps(a.v, b.v)}; }
  friend SimdFloat operator*(SimdFloat a, SimdFloat b) { return {_mm512_mul_ps(a.v, b.v)}; }
  friend SimdFloat operator/(SimdFloat a, SimdFloat b) { return {_mm512_div_ps(a.v, b.v)}; }
  friend SimdFloat max(SimdFloat a, SimdFloat b) { return {_mm512_max_ps(a.v, b.v)}; }
  friend SimdFloat min(SimdFloat a, SimdFloat b) { return {_mm512_min_ps(a.v, b.v)}; }
  friend SimdFloat multiply_add(SimdFloat a, SimdFloat b, SimdFloat c) {
    return {_mm512_fmadd_ps(a.v, b.v, c.v)};
  }
  friend SimdFloat select_less(SimdFloat a, SimdFloat b, SimdFloat x, SimdFloat y) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
  }
  friend SimdFloat power_of_two(SimdFloat n) {
    const __m512i shifted = _mm512_slli_epi32(_mm512_castps_si512(n.v), 23);
    return {_mm512_castsi512_ps(_mm512_add_epi32(shifted, _mm512_set1_epi32(0x3f800000)))};
  }
  template <uint32_t kDistance>
  friend SimdFloat exchange(SimdFloat a) {
    if constexpr (kDistance < 4) {
      return {_mm512_permute_ps(a.v, kDistance == 1 ? 0xb1 : 0x4e)};
    } else {
      return {_mm512_shuffle_f32x4(a.v, a.v, kDistance == 4 ? 0xb1 : 0x4e)};
    }
  }
  __m128 quarters_sum() const {
    const __m256 low = _mm512_castps512_ps256(v);
    return halves_sum(_mm256_add_ps(low, _mm512_extractf32x8_ps(v, 1)));
  }
  friend float sum(SimdFloat a) {
    const __m128 quarter = a.quarters_sum();
    return _mm_cvtss_f32(sum4_lanes(quarter, quarter, quarter, quarter));
  }
  friend float largest(SimdFloat a) {
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    return largest_lane(_mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  friend void store_sum4(const SimdFloat (&a)[4], float* out) {
    _mm_storeu_ps(out, sum4_lanes(a[0].quarters_sum(), a[1].quarters_sum(), a[2].quarters_sum(),
                                  a[3].quarters_sum()));
  }
};

#elif NIBBLE_SIMD_LANES == 8

struct SimdFloat {
  static constexpr uint32_t kLanes = 8;
  __m256 v;

  static SimdFloat load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static SimdFloat load(const uint16_t* halves) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves)))};
  }
  static SimdFloat load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
  }
  static SimdFloat all(float x) { return {_mm256_set1_ps(x)}; }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(uint16_t* halves) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(halves),
                     _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }

  friend SimdFloat operator+(SimdFloat a, SimdFloat b) { return {_mm256_add_ps(a.v, b.v)}; }
  friend SimdFloat operator-(SimdFloat a, SimdFloat b) { return {_mm256_sub_ps(a.v, b.v)}; }
  friend SimdFloat operator*(SimdFloat a, SimdFloat b) { return {_mm256_mul_ps(a.v, b.v)}; }
  friend SimdFloat operator/(SimdFloat a, SimdFloat b) { return {_mm256_div_ps(a.v, b.v)}; }
  friend SimdFloat max(SimdFloat a, SimdFloat b) { return {_mm256_max_ps(a.v, b.v)}; }
  friend SimdFloat min(SimdFloat a, SimdFloat b) { return {_mm256_min_ps(a.v, b.v)}; }
  friend SimdFloat multiply_add(SimdFloat a, SimdFloat b, SimdFloat c) {
    return {_mm256_fmadd_ps(a.v, b.v, c.v)};
  }
  friend SimdFloat select_less(SimdFloat a, SimdFloat b, SimdFloat x, SimdFloat y) {
    return {_mm256_blendv_ps(y.v, x.v, _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ))};
  }
  friend SimdFloat power_of_two(SimdFloat n) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(n.v), 23);
    return {_mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(0x3f800000)))};
  }
  template <uint32_t kDistance>
  friend SimdFloat exchange(SimdFloat a) {
    if constexpr (kDistance < 4) {
      return {_mm256_permute_ps(a.v, kDistance == 1 ? 0xb1 : 0x4e)};
    } else {
      return {_mm256_permute2f128_ps(a.v, a.v, 1)};
    }
  }
  friend float sum(SimdFloat a) {
    const __m128 half = halves_sum(a.v);
    return _mm_cvtss_f32(sum4_lanes(half, half, half, half));
  }
  friend float largest(SimdFloat a) {
    return largest_lane(_mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1)));
  }
  friend void store_sum4(const SimdFloat (&a)[4], float* out) {
    _mm_storeu_ps(out, sum4_lanes(halves_sum(a[0].v), halves_sum(a[1].v), halves_sum(a[2].v),
                                  halves_sum(a[3].v)));
  }
};

#elif NIBBLE_SIMD_LANES == 4

struct SimdFloat {
  static constexpr uint32_t kLanes = 4;
  float32x4_t v;

  static SimdFloat load(const float* p) { return {vld1q_f32(p)}; }
  static SimdFloat load(const uint16_t* halves) {
    return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)))};
  }
  static SimdFloat load(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    const int8x8_t bytes = vreinterpret_s8_s32(vdup_n_s32(four));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))))};
  }
  static SimdFloat all(float x) { return {vdupq_n_f32(x)}; }
  void store(float* p) const { vst1q_f32(p, v); }
  void store(uint16_t* halves) const { vst1_u16(halves, vreinterpret_u16_f16(vcvt_f16_f32(v))); }

  friend SimdFloat operator+(SimdFloat a, SimdFloat b) { return {vaddq_f32(a.v, b.v)}; }
  friend SimdFloat operator-(SimdFloat a, SimdFloat b) { return {vsubq_f32(a.v, b.v)}; }
  friend SimdFloat operator*(SimdFloat a, SimdFloat b) { return {vmulq_f32(a.v, b.v)}; }
  friend SimdFloat operator/(SimdFloat a, SimdFloat b) { return {vdivq_f32(a.v, b.v)}; }
  friend SimdFloat max(SimdFloat a, SimdFloat b) {
    return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)};
  }
  friend SimdFloat min(SimdFloat a, SimdFloat b) {
    return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)};
  }
  friend SimdFloat multiply_add(SimdFloat a, SimdFloat b, SimdFloat c) {
    return {vfmaq_f32(c.v, a.v, b.v)};
  }
  friend SimdFloat select_less(SimdFloat a, SimdFloat b, SimdFloat x, SimdFloat y) {
    return {vbslq_f32(vcltq_f32(a.v, b.v), x.v, y.v)};
  }
  friend SimdFloat power_of_two(SimdFloat n) {
    const uint32x4_t shifted = vshlq_n_u32(vreinterpretq_u32_f32(n.v), 23);
    return {vreinterpretq_f32_u32(vaddq_u32(shifted, vdupq_n_u32(0x3f800000u)))};
  }
  template <uint32_t kDistance>
  friend SimdFloat exchange(SimdFloat a) {
    return {kDistance == 1 ? vrev64q_f32(a.v) : vextq_f32(a.v, a.v, 2)};
  }
  friend float sum(SimdFloat a) { return vaddvq_f32(a.v); }  // (0 + 1) + (2 + 3), as in sum4
  friend float largest(SimdFloat a) { return vmaxvq_f32(a.v); }
  friend void store_sum4(const SimdFloat (&a)[4], float* out) {
    vst1q_f32(out, vpaddq_f32(vpaddq_f32(a[0].v, a[1].v), vpaddq_f32(a[2].v, a[3].v)));
  }
};

#else

using SimdFloat = ScalarFloat;

#endif

// Calls body(V{}, i) for vectors V that cover [0, n) without overlap: wide ones, then single
// floats.
template <class Body>
inline void for_each_vector(size_t n, const Body& body) {
  size_t i = 0;
  for (; i + SimdFloat::kLanes <= n; i += SimdFloat::kLanes) body(SimdFloat{}, i);
  for (; i < n; ++i) body(ScalarFloat{}, i);
}

// Adding this to a float of magnitude below 2^22 rounds it to an integer, which then lies in the
// low bits of the sum's mantissa.
constexpr float kIntegerShift = 0x1.8p23f;

// e^x within 2^-22 relative for x in [-87.3, 88.3]: x = n ln 2 + r, |r| <= ln(2) / 2, e^r by
// Cephes' polynomial, whose own error is below 2^-25; the rest are the roundings of the last four
// operations. Below that range 0, above it e^88.3; e^0 is exactly 1; NaN stays NaN.
template <class V>
inline V exponential(V x) {
  const V clamped = min(V::all(88.3f), max(V::all(-87.3f), x));
  const V shifted = multiply_add(clamped, V::all(1.44269504f), V::all(kIntegerShift));
  const V n = shifted - V::all(kIntegerShift);
  V r = multiply_add(n, V::all(-0x1.62e4p-1f),
                     clamped);  // ln 2 in two parts, n times the first exact
  r = multiply_add(n, V::all(-0x1.7f7d1cp-20f), r);
  V p = V::all(1.9875691500e-4f);
  p = multiply_add(p, r, V::all(1.3981999507e-3f));
  p = multiply_add(p, r, V::all(8.3334519073e-3f));
  p = multiply_add(p, r, V::all(4.1665795894e-2f));
  p = multiply_add(p, r, V::all(1.6666665459e-1f));
  p = multiply_add(p, r, V::all(5.0000001201e-1f));
  const V result = (multiply_add(p, r * r, r) + V::all(1)) * power_of_two(shifted);
  return select_less(x, V::all(-87.3f), V::all(0), result);
}

}  // namespace
}  // namespace nibble::cpu
