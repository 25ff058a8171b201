#pragma once
// KV format q8 (docs/formats/kv-q8.md) in registers.

#include "cuda/attention/kv_blocks.cuh"

namespace nibble::cuda {

struct CodecQ8 {
  static constexpr backend::KvFormat kFormat = backend::KvFormat::kQ8;
  static constexpr uint32_t kEightWords = 2;  // words of 32 bits that eight numbers take
  static constexpr bool kRotated = false;

  // Four signed bytes. 1024 + u is what 0x6400 | u means in f16, exactly.
  __device__ static __forceinline__ void decode_word(uint32_t word, __half2* values) {
    const uint32_t biased = word ^ 0x80808080;
    const __half2 bias = __half2half2(__ushort_as_half(0x6480));  // 1024 + 128
    values[0] = __hsub2(ptx::as_half2(__byte_perm(biased, 0x64646464, 0x4140)), bias);
    values[1] = __hsub2(ptx::as_half2(__byte_perm(biased, 0x64646464, 0x4342)), bias);
  }
  // Eight numbers to f16, pairs in order.
  __device__ static __forceinline__ void decode(const uint32_t* words, __half2 (&values)[4]) {
    decode_word(words[0], values);
    decode_word(words[1], values + 2);
  }

  // The lane's numbers of a block; returns the block's scale.
  template <uint32_t kBlock>
  __device__ static __forceinline__ float encode(const float (&x)[kLaneValues],
                                                 uint32_t (&words)[4], uint32_t lane) {
    float largest = 0;
#pragma unroll
    for (const float value : x) largest = ptx::max_or_nan(largest, fabsf(value));
#pragma unroll
    for (uint32_t step = 1; step < kBlock / kLaneValues; step *= 2)
      largest = ptx::max_or_nan(largest, __shfl_xor_sync(kAllLanes, largest, step));
    const float scale = __half2float(__float2half_rn(largest * (1.0f / 127)));
    const float inverse = scale > 0 ? __fdividef(1, scale) : 0;
#pragma unroll
    for (uint32_t i = 0; i < kLaneValues; i += 4) {
      uint32_t numbers[4];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        // A small scale, rounded down, may take the largest values beyond 127.
        const float scaled = fminf(fmaxf(x[i + j] * inverse, -127.0f), 127.0f);
        // The sum's unit in the last place is 1: its low byte is the rounded number.
        numbers[j] = __float_as_uint(scaled + 0x1.8p23f);
      }
      words[i / 4] = __byte_perm(__byte_perm(numbers[0], numbers[1], 0x0040),
                                 __byte_perm(numbers[2], numbers[3], 0x0040), 0x5410);
    }
    return scale;
  }
};

template <int kDim>
using KvQ8 = KvBlocks<CodecQ8, kDim, 32>;

}  // namespace nibble::cuda
