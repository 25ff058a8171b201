#pragma once
// KV format tq4 (docs/formats/kv-tq4.md) in registers.

#include "backend/kv_tq4.h"
#include "cuda/attention/kv_blocks.cuh"

namespace nibble::cuda {

// The codebook's bytes `shift / 8` of magnitudes [first, first + 4), for __byte_perm.
constexpr uint32_t tq4_table(uint32_t first, uint32_t shift) {
  uint32_t table = 0;
  for (uint32_t i = 0; i < 4; ++i)
    table |= uint32_t(backend::kTq4Magnitudes[first + i] >> shift & 0xff) << 8 * i;
  return table;
}

template <size_t kIndex>
inline constexpr float kTq4Boundary = backend::kTq4Boundaries[kIndex];

// Keeps the compiler from making it anew wherever it is used: of a byte permutation, only one
// operand can be a constant, and the others would be moved to registers each time.
__device__ __forceinline__ uint32_t in_register(uint32_t x) {
  asm("" : "+r"(x));
  return x;
}

struct CodecTq4 {
  static constexpr backend::KvFormat kFormat = backend::KvFormat::kTq4;
  static constexpr uint32_t kEightWords = 1;  // words of 32 bits that eight numbers take
  static constexpr bool kRotated = true;

  // The four magnitudes that the low half of `indices` selects, with the signs of `signs`, a bit in
  // each byte.
  __device__ static __forceinline__ void decode_half(uint32_t indices, uint32_t signs,
                                                     __half2* values) {
    const uint32_t low =
        __byte_perm(in_register(tq4_table(0, 0)), in_register(tq4_table(4, 0)), indices);
    const uint32_t high = ptx::and_or(
        signs, 0x80808080,
        __byte_perm(in_register(tq4_table(0, 8)), in_register(tq4_table(4, 8)), indices));
    values[0] = ptx::as_half2(__byte_perm(low, high, 0x5140));
    values[1] = ptx::as_half2(__byte_perm(low, high, 0x7362));
  }
  // Eight numbers to f16, pairs in order.
  __device__ static __forceinline__ void decode(const uint32_t* words, __half2 (&values)[4]) {
    const uint32_t indices = in_register(words[0] & 0x77777777);
    decode_half(indices, words[0], values);
    decode_half(indices >> 16, words[0] << 4, values + 2);
  }

  // D x, of a block whose values the lanes have kLaneValues each of.
  template <uint32_t kBlock>
  __device__ static __forceinline__ void change_signs(float (&x)[kLaneValues], uint32_t lane) {
    constexpr uint32_t kWord0 = backend::kTq4Signs[0], kWord1 = backend::kTq4Signs[1],
                       kWord2 = backend::kTq4Signs[2], kWord3 = backend::kTq4Signs[3];
    const uint32_t index = lane * kLaneValues % kBlock;  // in the block
    const uint32_t low = index & 32 ? kWord1 : kWord0, high = index & 32 ? kWord3 : kWord2;
    const uint32_t signs = (index & 64 ? high : low) >> index % 32;
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; ++i)
      x[i] = __uint_as_float(__float_as_uint(x[i]) ^ (signs << (31 - i) & 0x80000000));
  }
  // H x
  template <uint32_t kBlock>
  __device__ static __forceinline__ void walsh_hadamard(float (&x)[kLaneValues], uint32_t lane) {
#pragma unroll
    for (uint32_t stride = 1; stride < kLaneValues; stride *= 2) {
#pragma unroll
      for (uint32_t i = 0; i < kLaneValues; ++i) {
        if (i & stride) continue;
        const float low = x[i], high = x[i + stride];
        x[i] = low + high;
        x[i + stride] = low - high;
      }
    }
#pragma unroll
    for (uint32_t stride = 1; stride < kBlock / kLaneValues; stride *= 2) {
      const float sign = lane & stride ? -1.0f : 1.0f;
#pragma unroll
      for (float& value : x) value = fmaf(sign, value, __shfl_xor_sync(kAllLanes, value, stride));
    }
    constexpr float kNormal = kBlock == 128  ? 0x1p-3f * 0.70710678118654752f
                              : kBlock == 64 ? 0x1p-3f
                                             : 0x1p-2f * 0.70710678118654752f;
#pragma unroll
    for (float& value : x) value *= kNormal;
  }
  // H D x
  template <uint32_t kBlock>
  __device__ static __forceinline__ void rotate(float (&x)[kLaneValues], uint32_t lane) {
    change_signs<kBlock>(x, lane);
    walsh_hadamard<kBlock>(x, lane);
  }
  // D H x, the inverse.
  template <uint32_t kBlock>
  __device__ static __forceinline__ void rotate_back(float (&x)[kLaneValues], uint32_t lane) {
    walsh_hadamard<kBlock>(x, lane);
    change_signs<kBlock>(x, lane);
  }

  // How many boundaries x reaches.
  __device__ static __forceinline__ uint32_t magnitude_index(float x) {
    const bool upper = x >= kTq4Boundary<3>;
    const bool middle = x >= (upper ? kTq4Boundary<5> : kTq4Boundary<1>);
    const float low_boundary = middle ? kTq4Boundary<2> : kTq4Boundary<0>;
    const float high_boundary = middle ? kTq4Boundary<6> : kTq4Boundary<4>;
    const bool lower = x >= (upper ? high_boundary : low_boundary);
    return 4 * upper + 2 * middle + lower;
  }

  // The lane's numbers of a block; returns the block's scale.
  template <uint32_t kBlock>
  __device__ static __forceinline__ float encode(float (&x)[kLaneValues], uint32_t (&words)[2],
                                                 uint32_t lane) {
    constexpr uint32_t kBlockLanes = kBlock / kLaneValues;
    rotate<kBlock>(x, lane);
    float squares = 0;
#pragma unroll
    for (const float value : x) squares += value * value;
    squares = warp_sum<kBlockLanes>(squares);
    const float to_unit = squares > 0 ? sqrtf(float(kBlock) / squares) : 0;
    float code_squares = 0;
    words[0] = words[1] = 0;
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; ++i) {
      const float unit = x[i] * to_unit;
      const uint32_t index = magnitude_index(fabsf(unit));
      const uint32_t bits = __byte_perm(tq4_table(0, 0), tq4_table(4, 0), index) & 0xff |
                            (__byte_perm(tq4_table(0, 8), tq4_table(4, 8), index) & 0xff) << 8;
      const float magnitude = __half2float(__ushort_as_half(uint16_t(bits)));
      code_squares += magnitude * magnitude;
      words[i / 8] |= index << backend::tq4_magnitude_shift(i % 8) |
                      __float_as_uint(unit) >> 31 << backend::tq4_sign_shift(i % 8);
    }
    return sqrtf(squares / warp_sum<kBlockLanes>(code_squares));
  }
};

template <int kDim, int kBlock>
using KvTq4 = KvBlocks<CodecTq4, kDim, kBlock>;

// Calls body<KvTq4>(). Blocks are of 128 values where the head and the RoPE block of a shared row
// allow it.
template <class Body>
void with_kv_tq4(const AttentionKernelArgs& args, const Body& body) {
  with_head_dim(args, [&]<int kDim>() {
    if constexpr (kDim >= 128) {
      if (args.layer.kv.block == 128) return body.template operator()<KvTq4<kDim, 128>>();
    }
    if (args.layer.kv.block == 64) return body.template operator()<KvTq4<kDim, 64>>();
    body.template operator()<KvTq4<kDim, 32>>();
  });
}

}  // namespace nibble::cuda
