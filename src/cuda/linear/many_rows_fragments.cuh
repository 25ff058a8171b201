#pragma once
// From a tile's bits to f16 weights, for the matrix-matrix kernels. TileScales<Layout> are a lane's
// scales of a tile; HalfTile<Layout> are its quants of one of its two groups of 32 columns, and
// weights() makes of both the left operand of one matrix instruction.
//
// Unlike the matrix-vector kernels, which scale the sums of a tile, these hold too many sums for
// that: a weight is finished before it is multiplied, rounded to f16's 11 bits like the activation
// that it meets. Scales and minimums are products of the block's f16 and a small integer, rounded
// once. They may be so small that f16 has fewer bits for them; the block's own scale, smaller
// still, then had fewer in the file already.

#include "cuda/linear/fragments.cuh"

namespace nibble::cuda {

template <class Layout>
struct TileScales;
template <class Layout>
struct HalfTile;

// Of rows g and g + 8: a pair for the lane's two groups of columns.
struct KTileScales {
  __half2 scales[2], minimums[2];  // minimums negated

  __device__ __forceinline__ void load(const KScalesTiled& tile, uint32_t lane) {
    KScalesFragment fragment;
    fragment.load(tile, lane);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half2 block = fragment.block[half];
      scales[half] = __hmul2(fragment.scales(half), __low2half2(block));
      minimums[half] = __hmul2(fragment.mins(half), __hneg2(__high2half2(block)));
    }
  }
  // From 1024 + q, or from 1024 + 16 q for odd pairs.
  __device__ __forceinline__ __half2 weights(uint32_t bits, int half, int group, int pair) const {
    const __half2 quants = pair % 2
                               ? __hfma2(ptx::as_half2(bits), half2_of(0.0625f), half2_of(-64.0f))
                               : __hsub2(ptx::as_half2(bits), half2_of(1024.0f));
    return __hfma2(quants, pick(scales[half], group), pick(minimums[half], group));
  }
};

template <>
struct TileScales<CudaQ4Tiled> : KTileScales {
  __device__ __forceinline__ void load(const CudaQ4Tiled& tile, uint32_t lane) {
    KTileScales::load(tile.scales, lane);
  }
};

template <>
struct HalfTile<CudaQ4Tiled> {
  uint4 quants[2];

  __device__ __forceinline__ void load(const CudaQ4Tiled& tile, uint32_t lane, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      quants[half] = *reinterpret_cast<const uint4*>(tile.quants[2 * half + group][lane]);
  }
  // Pairs 2 * pairs and 2 * pairs + 1 of the group's `step`, of rows g and g + 8.
  __device__ __forceinline__ void weights(const TileScales<CudaQ4Tiled>& scales, int group,
                                          int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&quants[half])[step] >> (8 * pairs);
      a[half] = scales.weights(ptx::and_or(word, 0x000f000f, kMagic), half, group, 0);
      a[2 + half] = scales.weights(ptx::and_or(word, 0x00f000f0, kMagic), half, group, 1);
    }
  }
};

template <>
struct TileScales<CudaQ5Tiled> : KTileScales {
  __device__ __forceinline__ void load(const CudaQ5Tiled& tile, uint32_t lane) {
    KTileScales::load(tile.scales, lane);
  }
};

template <>
struct HalfTile<CudaQ5Tiled> {
  uint4 quants[2];
  uint32_t high_bits[2];

  __device__ __forceinline__ void load(const CudaQ5Tiled& tile, uint32_t lane, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      quants[half] = *reinterpret_cast<const uint4*>(tile.quants[2 * half + group][lane]);
      high_bits[half] = tile.high_bits[lane][2 * half + group];
    }
  }
  __device__ __forceinline__ void weights(const TileScales<CudaQ5Tiled>& scales, int group,
                                          int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&quants[half])[step];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t bits =
            Fragment<CudaQ5Tiled>::bits(word, high_bits[half], step, 2 * pairs + i);
        a[2 * i + half] = scales.weights(bits, half, group, i);
      }
    }
  }
};

template <>
struct TileScales<CudaQ6Tiled> {
  __half2 scales[2][2];  // [half][group]: of the group's two halves of 16

  __device__ __forceinline__ void load(const CudaQ6Tiled& tile, uint32_t lane) {
    const uint2 bytes = *reinterpret_cast<const uint2*>(tile.scales[lane]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const __half2 block = __half2half2(__ushort_as_half(tile.block_scales[lane / 4 + 8 * half]));
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        const __half2 integers =
            ptx::as_half2(__byte_perm(half ? bytes.y : bytes.x, kMagic, group ? 0x5352 : 0x5150));
        // 1024 and the layout's 128
        scales[half][group] = __hmul2(__hsub2(integers, half2_of(1152.0f)), block);
      }
    }
  }
};

template <>
struct HalfTile<CudaQ6Tiled> {
  uint4 low_bits[2];
  uint2 high_bits[2];

  __device__ __forceinline__ void load(const CudaQ6Tiled& tile, uint32_t lane, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      low_bits[half] = *reinterpret_cast<const uint4*>(tile.low_bits[2 * half + group][lane]);
      high_bits[half] = *reinterpret_cast<const uint2*>(&tile.high_bits[half][lane][2 * group]);
    }
  }
  __device__ __forceinline__ void weights(const TileScales<CudaQ6Tiled>& scales, int group,
                                          int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&low_bits[half])[step];
      const uint32_t high = reinterpret_cast<const uint32_t*>(&high_bits[half])[step / 2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i + half] = Fragment<CudaQ6Tiled>::weights(
            word, high, step, 2 * pairs + i, pick(scales.scales[half][group], step / 2));
      }
    }
  }
};

// A full f16 scale per group, of rows g and g + 8.
template <class Layout>
struct GroupScales {
  __half2 scales[2];

  __device__ __forceinline__ void load(const Layout& tile, uint32_t lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      scales[half] = *reinterpret_cast<const __half2*>(tile.scales[half][lane]);
  }
};

template <>
struct TileScales<CudaQ4SymmetricTiled> : GroupScales<CudaQ4SymmetricTiled> {};

template <>
struct HalfTile<CudaQ4SymmetricTiled> {
  uint4 quants[2];

  __device__ __forceinline__ void load(const CudaQ4SymmetricTiled& tile, uint32_t lane, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      quants[half] = *reinterpret_cast<const uint4*>(tile.quants[2 * half + group][lane]);
  }
  __device__ __forceinline__ void weights(const TileScales<CudaQ4SymmetricTiled>& scales, int group,
                                          int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word = reinterpret_cast<const uint32_t*>(&quants[half])[step];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i + half] = Fragment<CudaQ4SymmetricTiled>::weights(word, 2 * pairs + i,
                                                                  pick(scales.scales[half], group));
      }
    }
  }
};

template <>
struct TileScales<CudaQ8Tiled> : GroupScales<CudaQ8Tiled> {};

template <>
struct HalfTile<CudaQ8Tiled> {
  uint4 quants[2][2];

  __device__ __forceinline__ void load(const CudaQ8Tiled& tile, uint32_t lane, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        quants[half][i] =
            *reinterpret_cast<const uint4*>(tile.quants[4 * half + 2 * group + i][lane]);
      }
    }
  }
  __device__ __forceinline__ void weights(const TileScales<CudaQ8Tiled>& scales, int group,
                                          int step, int pairs, __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t word =
          reinterpret_cast<const uint32_t*>(&quants[half][step / 2])[step % 2 * 2 + pairs];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[2 * i + half] =
            Fragment<CudaQ8Tiled>::weights(word, i == 1, pick(scales.scales[half], group));
      }
    }
  }
};

template <class Block, quant::QuantType kType>
struct TileScales<CudaHalfTiled<Block, kType>> {
  __device__ __forceinline__ void load(const CudaHalfTiled<Block, kType>&, uint32_t) {}
};

template <class Block, quant::QuantType kType>
struct HalfTile<CudaHalfTiled<Block, kType>> {
  using Layout = CudaHalfTiled<Block, kType>;
  uint4 values[2][4];

  __device__ __forceinline__ void load(const Layout& tile, uint32_t lane, int group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        values[half][step] =
            *reinterpret_cast<const uint4*>(tile.values[8 * half + 4 * group + step][lane]);
      }
    }
  }
  __device__ __forceinline__ void weights(const TileScales<Layout>&, int, int step, int pairs,
                                          __half2 (&a)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* words = reinterpret_cast<const uint32_t*>(&values[half][step]) + 2 * pairs;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        a[2 * i + half] = __hmul2(Fragment<Layout>::weights(words[i]), half2_of(1.0f));
    }
  }
};

}  // namespace nibble::cuda
