#pragma once
// What a warp of single rows' kernel has of a head's keys and values.

#include "cuda/attention/keys.cuh"
#include "cuda/ptx.cuh"

namespace nibble::cuda {

namespace ptx {

template <uint32_t kWords>
__device__ __forceinline__ void load_shared(uint32_t (&to)[kWords], uint32_t address) {
  static_assert(kWords == 1 || kWords == 2 || kWords == 4);
  if constexpr (kWords == 1)
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(to[0]) : "r"(address) : "memory");
  if constexpr (kWords == 2)
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(address)
                 : "memory");
  if constexpr (kWords == 4)
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ __half load_shared_half(uint32_t address) {
  uint16_t bits;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
  return __ushort_as_half(bits);
}
__device__ __forceinline__ void store_shared(uint32_t to, uint4 words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w)
               : "memory");
}
__device__ __forceinline__ void store_shared(uint32_t to, uint16_t bits) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(to), "h"(bits) : "memory");
}

}  // namespace ptx

// A part of rows in shared memory, as its format's class reads it: kKeyTile of them.
struct KvTile {
  uint32_t rows;          // address of the first row's numbers; the format says how far the next is
  uint32_t scales;        // of the first row's scales, those of all its blocks
  uint32_t scale_stride;  // bytes between rows' scales

  // The same, so many rows on.
  template <class Kv>
  __device__ __forceinline__ KvTile from(uint32_t row) const {
    return {rows + row * Kv::kStride, scales + row * scale_stride, scale_stride};
  }
};

// What a warp reads of a row's keys and values: tiles of kTeamKeys, every stride-th from `tile` on,
// and of each the dimensions of one part of the head.
struct WarpShare {
  RowPlace place;
  VisibleKeys keys;
  uint32_t kv_head, tile, end, stride;
  uint32_t first_dim;  // in the order of the key's values on a row
  // Of values, the first so many dimensions are read from where `value_begin` says. The others are
  // what the keys are.
  uint32_t own_values, value_begin;

  template <class Kv>
  __device__ void set_part(const KvRows& kv, uint32_t part) {
    const uint32_t rope_dims = kv.order.rope_dims;
    first_dim = part * Kv::kPartDims;
    own_values = !kv.shared              ? Kv::kPartDims
                 : rope_dims > first_dim ? min(rope_dims - first_dim, Kv::kPartDims)
                                         : 0;
    value_begin = first_dim + (kv.shared ? Kv::kHeadDim : 0);
  }
};

}  // namespace nibble::cuda
