#include "cpu/linear/kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace nibble::cpu {
namespace {

struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kActivationRows = 8;
  static constexpr bool kSignedQuants = true;
  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));

  static uint32x4_t load_one(const std::byte* bytes) {
    return vreinterpretq_u32_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(bytes)));
  }

  static void load_columns(const std::byte* rows, size_t stride, U32 (&columns)[4]) {
    const uint32x4_t r0 = load_one(rows);
    const uint32x4_t r1 = load_one(rows + stride);
    const uint32x4_t r2 = load_one(rows + 2 * stride);
    const uint32x4_t r3 = load_one(rows + 3 * stride);
    const uint64x2_t even01 = vreinterpretq_u64_u32(vtrn1q_u32(r0, r1));  // words 0 and 2
    const uint64x2_t even23 = vreinterpretq_u64_u32(vtrn1q_u32(r2, r3));
    const uint64x2_t odd01 = vreinterpretq_u64_u32(vtrn2q_u32(r0, r1));  // words 1 and 3
    const uint64x2_t odd23 = vreinterpretq_u64_u32(vtrn2q_u32(r2, r3));
    columns[0] = (U32)vtrn1q_u64(even01, even23);
    columns[1] = (U32)vtrn1q_u64(odd01, odd23);
    columns[2] = (U32)vtrn2q_u64(even01, even23);
    columns[3] = (U32)vtrn2q_u64(odd01, odd23);
  }

  static F32 half_to_float(U32 halves) {
    return (F32)vcvt_f32_f16(vreinterpret_f16_u16(vmovn_u32((uint32x4_t)halves)));
  }

  static F32 fma(F32 a, F32 b, F32 c) {
    return (F32)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  static F32 fnma(F32 a, F32 b, F32 c) {
    return (F32)vfmsq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }

  template <int kMaximum, int kSteps>
  static I32 dot(const U32 (&w)[kSteps], const int8_t* x) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int i = 0; i < kSteps; i += 4) {
      const int8x16_t words = vld1q_s8(x + 4 * i);
      sum = vdotq_laneq_s32(sum, (int8x16_t)w[i], words, 0);
      sum = vdotq_laneq_s32(sum, (int8x16_t)w[i + 1], words, 1);
      sum = vdotq_laneq_s32(sum, (int8x16_t)w[i + 2], words, 2);
      sum = vdotq_laneq_s32(sum, (int8x16_t)w[i + 3], words, 3);
    }
    return (I32)sum;
  }

  static void fma4(const F32 (&w)[4], const float* x, F32 (&sums)[2]) {
    const float32x4_t values = vld1q_f32(x);
    sums[0] = (F32)vfmaq_laneq_f32((float32x4_t)sums[0], (float32x4_t)w[0], values, 0);
    sums[1] = (F32)vfmaq_laneq_f32((float32x4_t)sums[1], (float32x4_t)w[1], values, 1);
    sums[0] = (F32)vfmaq_laneq_f32((float32x4_t)sums[0], (float32x4_t)w[2], values, 2);
    sums[1] = (F32)vfmaq_laneq_f32((float32x4_t)sums[1], (float32x4_t)w[3], values, 3);
  }
};

}  // namespace
}  // namespace nibble::cpu

#include "cpu/linear/kernels_generic.h"

namespace nibble::cpu {
const Kernels kNeonKernels = kKernels;
}
#endif
