#pragma once
// Rows of f16 keys and values: from pages to shared memory to tensor-core operands.
//
// In shared memory the 16-byte chunks of row r are exchanged by r % 8, so that the eight rows of an
// 8 x 8 matrix lie in different banks. Another format of pages is another class like this one.

#include "cuda/ptx.cuh"

namespace nibble::cuda {

namespace ptx {

// Four 8 x 8 matrices of 16-bit values; lanes 8i to 8i + 7 give the rows of the i-th.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&to)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t matrix) {
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
}

// sums [16, 8] += a [16, 16] * b [16, 8], operands as load_matrices leaves them.
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, or 16 zero bytes.
__device__ __forceinline__ void copy_async_16_or_zero(uint32_t to, const void* from, bool copy) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(copy ? 16 : 0)
               : "memory");
}

}  // namespace ptx

template <int kDim>
struct KvF16 {
  static constexpr int kHeadDim = kDim;
  static constexpr uint32_t kRowBytes = 2 * kDim;
  static constexpr uint32_t kChunks = kRowBytes / 16;

  __device__ static __forceinline__ uint32_t chunk_at(uint32_t row, uint32_t chunk) {
    return row * kRowBytes + (chunk ^ row % 8) * 16;
  }
  // chunk_at(row, chunk + skip) from chunk_at(row, chunk): a multiple of 2 (or 4) is skipped, which
  // the chunk has no bits of.
  __device__ static __forceinline__ uint32_t skip_chunks(uint32_t at, uint32_t skip) {
    return (at ^ skip % 8 * 16) + skip / 8 * 128;
  }
  // Where lane l finds its row of four matrices that stand in a square: with kRowsFirst, the second
  // one lies 8 rows below the first, else 8 columns beside it.
  template <bool kRowsFirst>
  __device__ static __forceinline__ uint32_t square_at(uint32_t lane) {
    const uint32_t second = lane / 8 % 2, third = lane / 16;
    return kRowsFirst ? chunk_at(lane % 8 + 8 * second, third)
                      : chunk_at(lane % 8 + 8 * third, second);
  }
};

}  // namespace nibble::cuda
