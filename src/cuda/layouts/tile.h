#pragma once
// What the weight layouts of this room share: tiles of 16 rows by 256 columns, in the order in
// which a warp's tensor-core fragments take them. Format: docs/formats/cuda-tiles.md.
//
// A matrix is a row of tiles per 16 rows, tile [row / 16][column / 256]; missing rows and columns
// are zero. Lane 4 g + t of a warp owns the tile's rows g and g + 8 at columns [64 t, 64 t + 64),
// and reads them 16 bytes at a time, neighbours side by side.
//
// Packed models name each layout by its kName and kVersion (docs/formats/packed-model.md): whoever
// changes where a layout has its bits raises its version, and files packed before are refused.

#include <cstdint>
#include <cstring>
#include <string_view>

#include "base/half.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#define NIBBLE_HOST_DEVICE __host__ __device__
#else
#define NIBBLE_HOST_DEVICE
#endif

namespace nibble::cuda {

inline constexpr uint32_t kTileRows = 16;
inline constexpr uint32_t kTileColumns = 256;
inline constexpr uint32_t kLanes = 32;
inline constexpr uint32_t kLaneColumns = 64;  // consecutive columns that one lane owns

// Which lane holds an element of a tile, and where among that lane's own.
struct TilePlace {
  uint32_t lane;
  uint32_t half;    // 0: row g, 1: row g + 8
  uint32_t column;  // in [0, 64)
};

NIBBLE_HOST_DEVICE inline TilePlace tile_place(uint32_t row, uint32_t column) {
  return {row % 8 * 4 + column / kLaneColumns, row / 8, column % kLaneColumns};
}

// Eight values make one step of two matrix instructions, which take them in pairs: pair p is
// values 2p and 2p + 1, and both lie at the same place of a word's two halves, so that one mask
// extracts both.
struct PairPlace {
  uint32_t step;  // of the lane's 8
  uint32_t pair;  // of the step's 4
  uint32_t high;  // 0: lower half of the word, 1: upper
};

NIBBLE_HOST_DEVICE constexpr PairPlace pair_place(uint32_t lane_column) {
  return {lane_column / 8, lane_column % 8 / 2, lane_column % 2};
}

NIBBLE_HOST_DEVICE inline float half_bits_to_float(uint16_t bits) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(bits));
#else
  return f16_to_f32(bits);
#endif
}

// Products and differences that no compiler fuses: dequantisation is exact to the bit.
NIBBLE_HOST_DEVICE inline float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

NIBBLE_HOST_DEVICE inline float subtract(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

// Numbers as `Block`s hold them, at the alignment that arrays of them have on the device: that of
// the block's size. On the host they may lie anywhere.
template <class Block>
NIBBLE_HOST_DEVICE inline uint16_t load_u16(const uint8_t* bytes) {
  static_assert(sizeof(Block) % 2 == 0);
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const uint16_t*>(bytes);
#else
  return uint16_t(bytes[0] | bytes[1] << 8);
#endif
}
template <class Block>
NIBBLE_HOST_DEVICE inline uint32_t load_u32(const void* at) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Block) % 4 == 0) return *static_cast<const uint32_t*>(at);
#endif
  const uint8_t* const bytes = static_cast<const uint8_t*>(at);
  return load_u16<Block>(bytes) | uint32_t(load_u16<Block>(bytes + 2)) << 16;
}

// Signed bytes to unsigned ones, four at a time: exclusive or with it adds 128 to each.
inline constexpr uint32_t kAdd128 = 0x80808080;

// The bytes that hold fields of a step's eight columns, one each.
struct StepBytes {
  uint32_t words[2];

  // From byte `at` of a block's field; zeros where there is no block.
  template <class Block, size_t kSize>
  NIBBLE_HOST_DEVICE static StepBytes load(const Block* block, uint8_t (Block::*field)[kSize],
                                           uint32_t at) {
    if (!block) return {};
    const uint8_t* const bytes = &(block->*field)[at];
    return {{load_u32<Block>(bytes), load_u32<Block>(bytes + 4)}};
  }
  // The fields of kBits bits from bit `shift` on, as pairs: pair p at bit kBits * p of each half.
  template <uint32_t kBits>
  NIBBLE_HOST_DEVICE uint32_t pairs(uint32_t shift) const {
    return two_pairs<kBits>(words[0] >> shift) | two_pairs<kBits>(words[1] >> shift) << 2 * kBits;
  }

 private:
  template <uint32_t kBits>
  NIBBLE_HOST_DEVICE static uint32_t two_pairs(uint32_t bytes) {
    constexpr uint32_t kField = (1 << kBits) - 1, kTwoFields = (1 << 2 * kBits) - 1;
    bytes &= 0x01010101 * kField;
    bytes |= bytes >> (16 - kBits);  // columns 2 and 3 above columns 0 and 1
    return (bytes & kTwoFields) | (bytes >> 8 & kTwoFields) << 16;
  }
};

}  // namespace nibble::cuda
