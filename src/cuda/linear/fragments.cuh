#pragma once
// From a tile's bits to tensor-core operands. For each layout, Fragment<Layout> is what one lane
// holds of a tile, loaded by 16-byte reads; left() makes of it the left operand of one matrix
// instruction, and finish() adds what the instructions' sums over 256 columns stand for.
//
// A quant q becomes f16 by setting it into the mantissa of 1024 (1024 + q) or, one nibble up, of
// 1024 again (1024 + 16 q); one fused multiply-add takes the 1024 off and applies the group's
// integer scale, without rounding (all products of Q4_K and Q5_K are integers below 2048). The
// block's f16 scale multiplies the f32 sums of the 256 columns.

#include "cuda/layouts/activations.h"
#include "cuda/layouts/layouts.h"
#include "cuda/ptx.cuh"

namespace nibble::cuda {

// One lane's view of the activations of 256 columns: those of row g, in reading order, and of every
// eighth row behind it.
struct ActivationLane {
  const uint4* even_steps;  // chunk of step s at [4 s]
  const uint4* odd_steps;
  const uint2* means;  // groups 2t, 2t + 1: f16 pair and what its rounding left

  __device__ __forceinline__ uint4 chunk(int token_tile, int step) const {
    return (step % 2 ? odd_steps
                     : even_steps)[token_tile * kMatrixTokens * (kTileColumns / 8) + 4 * step];
  }
  __device__ __forceinline__ uint2 mean(int token_tile) const {
    return means[token_tile * kMatrixTokens * 4];
  }
};

inline constexpr uint32_t kMagic = 0x64006400;  // 1024 in both halves

__device__ __forceinline__ __half2 half2_of(float value) {
  return __half2half2(__float2half_rn(value));
}
__device__ __forceinline__ __half2 pick(__half2 pair, int which) {
  return which ? __high2half2(pair) : __low2half2(pair);
}

// The integers of a group: (scale * q) from 1024 + q, and from 1024 + 16 q.
struct IntegerScale {
  __half2 low_scale, low_offset, high_scale, high_offset;

  __device__ __forceinline__ explicit IntegerScale(__half2 scale)
      : low_scale(scale),
        low_offset(__hmul2(scale, half2_of(-1024.0f))),
        high_scale(__hmul2(scale, half2_of(0.0625f))),
        high_offset(__hmul2(scale, half2_of(-64.0f))) {}
  __device__ __forceinline__ __half2 low(uint32_t bits) const {
    return __hfma2(ptx::as_half2(bits), low_scale, low_offset);
  }
  __device__ __forceinline__ __half2 high(uint32_t bits) const {
    return __hfma2(ptx::as_half2(bits), high_scale, high_offset);
  }
};

// The lane's part of KScalesTiled, and what it does to the sums.
struct KScalesFragment {
  uint32_t low;
  uint32_t high;
  __half2 block[2];  // [half] scale of the scales, scale of the minimums

  __device__ __forceinline__ void load(const KScalesTiled& scales, uint32_t lane) {
    low = scales.low[lane];
    high = __byte_perm(scales.high[lane], 0, 0x4140);
    block[0] = *reinterpret_cast<const __half2*>(scales.block[lane / 4]);
    block[1] = *reinterpret_cast<const __half2*>(scales.block[lane / 4 + 8]);
  }
  __device__ __forceinline__ static __half2 integers(uint32_t bits) {
    return __hsub2(ptx::as_half2(ptx::and_or(bits, 0x003f003f, kMagic)), half2_of(1024.0f));
  }
  // Of groups 2t and 2t + 1.
  __device__ __forceinline__ __half2 scales(int half) const { return integers(low >> (6 * half)); }
  __device__ __forceinline__ __half2 mins(int half) const {
    return half ? integers(high >> 2) : integers((low >> 12 & 0x000f000f) | (high << 4));
  }

  // sums += block scale * scaled - block min scale * (minimums x means)
  __device__ __forceinline__ void finish(float (&sums)[4], const float (&scaled)[4],
                                         uint2 means) const {
    const __half2 first = mins(0), second = mins(1);
    const __half2 a[4] = {first, second, first, second};
    float minimums[4] = {};
    ptx::multiply_add(minimums, a, means.x, means.y);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = __low2float(block[half]);
      const float min_scale = -32.0f * __high2float(block[half]);  // a mean is a 32nd of the sum
#pragma unroll
      for (int i = 2 * half; i < 2 * half + 2; ++i) {
        sums[i] += scale * scaled[i] + min_scale * minimums[i];
      }
    }
  }
};

template <class Layout>
struct Fragment;

template <>
struct Fragment<CudaQ4Tiled> {
  uint4 quants[4];
  KScalesFragment scales;

  __device__ __forceinline__ void load(const CudaQ4Tiled& tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) quants[i] = *reinterpret_cast<const uint4*>(tile.quants[i][lane]);
    scales.load(tile.scales, lane);
  }

  // Of instruction `pairs` (0 or 1) of a step.
  __device__ __forceinline__ void left(int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const IntegerScale scale(pick(scales.scales(half), step / 4));
      const uint32_t word =
          reinterpret_cast<const uint32_t*>(&quants[2 * half + step / 4])[step % 4] >> (8 * pairs);
      a[half] = scale.low(ptx::and_or(word, 0x000f000f, kMagic));
      a[2 + half] = scale.high(ptx::and_or(word, 0x00f000f0, kMagic));
    }
  }
  __device__ __forceinline__ void finish(float (&sums)[4], const float (&scaled)[4],
                                         uint2 means) const {
    scales.finish(sums, scaled, means);
  }
};

template <>
struct Fragment<CudaQ5Tiled> {
  uint4 quants[4];
  uint4 high_bits;
  KScalesFragment scales;

  __device__ __forceinline__ void load(const CudaQ5Tiled& tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) quants[i] = *reinterpret_cast<const uint4*>(tile.quants[i][lane]);
    high_bits = *reinterpret_cast<const uint4*>(tile.high_bits[lane]);
    scales.load(tile.scales, lane);
  }

  // Pair `pair` of a step's word, as 1024 + q or (odd pairs) 1024 + 16 q.
  __device__ __forceinline__ static uint32_t bits(uint32_t word, uint32_t high, int step,
                                                  int pair) {
    const uint32_t low =
        ptx::and_or(word >> (8 * (pair / 2)), pair % 2 ? 0x00f000f0 : 0x000f000f, kMagic);
    const int shift = 4 * step + pair - (pair % 2 ? 8 : 4);  // to the bit above the nibble
    return ptx::and_or(shift < 0 ? high << -shift : high >> shift,
                       pair % 2 ? 0x01000100 : 0x00100010, low);
  }

  __device__ __forceinline__ void left(int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int part = 2 * half + step / 4;
      const IntegerScale scale(pick(scales.scales(half), step / 4));
      const uint32_t word = reinterpret_cast<const uint32_t*>(&quants[part])[step % 4];
      const uint32_t high = reinterpret_cast<const uint32_t*>(&high_bits)[part];
      a[half] = scale.low(bits(word, high, step % 4, 2 * pairs));
      a[2 + half] = scale.high(bits(word, high, step % 4, 2 * pairs + 1));
    }
  }
  __device__ __forceinline__ void finish(float (&sums)[4], const float (&scaled)[4],
                                         uint2 means) const {
    scales.finish(sums, scaled, means);
  }
};

// Here the integer products reach 4096 and those above 2048 are rounded to 11 bits, as the
// activations are.
template <>
struct Fragment<CudaQ6Tiled> {
  uint4 low_bits[4];
  uint4 high_bits[2];
  uint2 scales;
  uint16_t block_scales[2];

  __device__ __forceinline__ void load(const CudaQ6Tiled& tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      low_bits[i] = *reinterpret_cast<const uint4*>(tile.low_bits[i][lane]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      high_bits[half] = *reinterpret_cast<const uint4*>(tile.high_bits[half][lane]);
      block_scales[half] = tile.block_scales[lane / 4 + 8 * half];
    }
    scales = *reinterpret_cast<const uint2*>(tile.scales[lane]);
  }

  // scale * (q - 32) of pair `pair` of a step.
  __device__ __forceinline__ static __half2 weights(uint32_t word, uint32_t high, int step,
                                                    int pair, __half2 scale) {
    const uint32_t low =
        ptx::and_or(word >> (8 * (pair / 2)), pair % 2 ? 0x00f000f0 : 0x000f000f, kMagic);
    const int shift = 8 * (step % 2) + 2 * pair - (pair % 2 ? 8 : 4);
    const __half2 quant = ptx::as_half2(ptx::and_or(shift < 0 ? high << -shift : high >> shift,
                                                    pair % 2 ? 0x03000300 : 0x00300030, low));
    // 1024 + 32 and 64 + 32
    const __half2 centred = pair % 2 ? __hfma2(quant, half2_of(0.0625f), half2_of(-96.0f))
                                     : __hsub2(quant, half2_of(1056.0f));
    return __hmul2(centred, scale);
  }

  __device__ __forceinline__ void left(int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // 1024 and the layout's 128
      const __half2 group_scales =
          __hsub2(ptx::as_half2(
                      __byte_perm(half ? scales.y : scales.x, kMagic, step / 4 ? 0x5352 : 0x5150)),
                  half2_of(1152.0f));
      const __half2 scale = pick(group_scales, step / 2 % 2);
      const uint32_t word =
          reinterpret_cast<const uint32_t*>(&low_bits[2 * half + step / 4])[step % 4];
      const uint32_t high = reinterpret_cast<const uint32_t*>(&high_bits[half])[step / 2];
      a[half] = weights(word, high, step, 2 * pairs, scale);
      a[2 + half] = weights(word, high, step, 2 * pairs + 1, scale);
    }
  }
  __device__ __forceinline__ void finish(float (&sums)[4], const float (&scaled)[4], uint2) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      sums[i] += __half2float(__ushort_as_half(block_scales[i / 2])) * scaled[i];
  }
};

// Of layouts whose weights are complete before they are multiplied.
struct FinishedFragment {
  __device__ __forceinline__ void finish(float (&sums)[4], const float (&scaled)[4], uint2) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) sums[i] += scaled[i];
  }
};

// The formats below have a full f16 scale per 32, which multiplies in f16.

template <>
struct Fragment<CudaQ4SymmetricTiled> : FinishedFragment {
  uint4 quants[4];
  __half2 scales[2];

  __device__ __forceinline__ void load(const CudaQ4SymmetricTiled& tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 4; ++i) quants[i] = *reinterpret_cast<const uint4*>(tile.quants[i][lane]);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scales[half] = *reinterpret_cast<const __half2*>(tile.scales[half][lane]);
  }

  __device__ __forceinline__ static __half2 weights(uint32_t word, int pair, __half2 scale) {
    const __half2 quant = ptx::as_half2(
        ptx::and_or(word >> (8 * (pair / 2)), pair % 2 ? 0x00f000f0 : 0x000f000f, kMagic));
    const __half2 centred = pair % 2 ? __hfma2(quant, half2_of(0.0625f), half2_of(-72.0f))
                                     : __hsub2(quant, half2_of(1032.0f));
    return __hmul2(centred, scale);
  }

  __device__ __forceinline__ void left(int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half2 scale = pick(scales[half], step / 4);
      const uint32_t word =
          reinterpret_cast<const uint32_t*>(&quants[2 * half + step / 4])[step % 4];
      a[half] = weights(word, 2 * pairs, scale);
      a[2 + half] = weights(word, 2 * pairs + 1, scale);
    }
  }
};

template <>
struct Fragment<CudaQ8Tiled> : FinishedFragment {
  uint4 quants[8];
  __half2 scales[2];

  __device__ __forceinline__ void load(const CudaQ8Tiled& tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 8; ++i) quants[i] = *reinterpret_cast<const uint4*>(tile.quants[i][lane]);
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scales[half] = *reinterpret_cast<const __half2*>(tile.scales[half][lane]);
  }

  // Bytes 0 and 1, or 2 and 3, of a word.
  __device__ __forceinline__ static __half2 weights(uint32_t word, bool upper, __half2 scale) {
    const __half2 quant = ptx::as_half2(__byte_perm(word, kMagic, upper ? 0x5352 : 0x5150));
    return __hmul2(__hsub2(quant, half2_of(1152.0f)), scale);
  }

  __device__ __forceinline__ void left(int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half2 scale = pick(scales[half], step / 4);
      const uint32_t word =
          reinterpret_cast<const uint32_t*>(&quants[4 * half + step / 2])[step % 2 * 2 + pairs];
      a[half] = weights(word, false, scale);
      a[2 + half] = weights(word, true, scale);
    }
  }
};

template <class Block, quant::QuantType kType>
struct Fragment<CudaHalfTiled<Block, kType>> : FinishedFragment {
  uint4 values[16];

  __device__ __forceinline__ void load(const CudaHalfTiled<Block, kType>& tile, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < 16; ++i) values[i] = *reinterpret_cast<const uint4*>(tile.values[i][lane]);
  }

  __device__ __forceinline__ static __half2 weights(uint32_t pair) {
    if constexpr (kType == quant::QuantType::kF16) return ptx::as_half2(pair);
    return __floats2half2_rn(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000));
  }

  __device__ __forceinline__ void left(int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(&values[8 * half + step]);
      a[half] = weights(words[2 * pairs]);
      a[2 + half] = weights(words[2 * pairs + 1]);
    }
  }
};

// sums [row tile][token tile] += tiles x activations.
template <class Layout, int kRowTiles, int kTokenTiles>
__device__ __forceinline__ void multiply(const Fragment<Layout> (&fragments)[kRowTiles],
                                         const ActivationLane& activations,
                                         float (&sums)[kRowTiles][kTokenTiles][4]) {
  // An instruction waits for the one before it with the same sums: one chain would be too few.
  constexpr int kChains = kRowTiles * kTokenTiles == 1 ? 2 : 1;
  float scaled[kChains][kRowTiles][kTokenTiles][4] = {};
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    uint4 right[kTokenTiles];
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) right[j] = activations.chunk(j, step);
#pragma unroll
    for (int pairs = 0; pairs < 2; ++pairs) {
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        __half2 left[4];
        fragments[i].left(step, pairs, left);
#pragma unroll
        for (int j = 0; j < kTokenTiles; ++j) {
          ptx::multiply_add(scaled[pairs % kChains][i][j], left, pairs ? right[j].z : right[j].x,
                            pairs ? right[j].w : right[j].y);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < kTokenTiles; ++j) {
      float(&total)[4] = scaled[0][i][j];
      if constexpr (kChains == 2) {
#pragma unroll
        for (int k = 0; k < 4; ++k) total[k] += scaled[1][i][j][k];
      }
      fragments[i].finish(sums[i][j], total, activations.mean(j));
    }
  }
}

}  // namespace nibble::cuda
