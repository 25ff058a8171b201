#include "cpu/linear/kernels.h"

namespace nibble::cpu {
namespace {

// GNU vectors of 4 lanes: one SSE2 or NEON register where there are such, plain code elsewhere.
struct Simd {
  static constexpr int kLanes = 4;
  static constexpr int kActivationRows = 4;
  static constexpr bool kSignedQuants = true;
  typedef uint32_t U32 __attribute__((vector_size(16)));
  typedef int32_t I32 __attribute__((vector_size(16)));
  typedef float F32 __attribute__((vector_size(16)));

  typedef int16_t I16 __attribute__((vector_size(16)));

  static I16 even_bytes(U32 v) { return (I16)(v << 8) >> 8; }
  static I16 odd_bytes(U32 v) { return (I16)v >> 8; }

  static void load_columns(const std::byte* rows, size_t stride, U32 (&columns)[4]) {
    uint32_t words[kLanes][4];
    for (int n = 0; n < kLanes; ++n) __builtin_memcpy(words[n], rows + n * stride, 16);
    for (int c = 0; c < 4; ++c) {
      columns[c] = U32{words[0][c], words[1][c], words[2][c], words[3][c]};
    }
  }

  // Exact: a normal number's exponent is moved, a subnormal one is a multiple of 2^-24.
  static F32 half_to_float(U32 halves) {
    const U32 sign = (halves & 0x8000) << 16;
    const U32 exponent = halves >> 10 & 0x1f;
    const U32 mantissa = halves & 0x3ff;
    const U32 normal = (exponent + 112) << 23 | mantissa << 13;
    const U32 special = 0x7f800000 | mantissa << 13;
    const U32 subnormal = (U32)(__builtin_convertvector((I32)mantissa, F32) * 0x1p-24f);
    const U32 magnitude = exponent == 0 ? subnormal : (exponent == 0x1f ? special : normal);
    return (F32)(sign | magnitude);
  }

  static F32 fma(F32 a, F32 b, F32 c) { return a * b + c; }
  static F32 fnma(F32 a, F32 b, F32 c) { return c - a * b; }

  // Two products of signed bytes fit into 16 bits: even bytes and odd bytes of a word.
  template <int kMaximum, int kSteps>
  static I32 dot(const U32 (&w)[kSteps], const int8_t* x) {
    I32 sum = {};
    for (int i = 0; i < kSteps; ++i) {
      uint32_t word;
      __builtin_memcpy(&word, x + 4 * i, sizeof word);
      const U32 words = word - U32{};
      const I16 pairs = even_bytes(w[i]) * even_bytes(words) + odd_bytes(w[i]) * odd_bytes(words);
      sum += ((I32)pairs << 16 >> 16) + ((I32)pairs >> 16);
    }
    return sum;
  }

  static void fma4(const F32 (&w)[4], const float* x, F32 (&sums)[2]) {
    for (int k = 0; k < 4; ++k) sums[k % 2] += w[k] * x[k];
  }
};

}  // namespace
}  // namespace nibble::cpu

#include "cpu/linear/kernels_generic.h"

namespace nibble::cpu {
const Kernels kScalarKernels = kKernels;
}
