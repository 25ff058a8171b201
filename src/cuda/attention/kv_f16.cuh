#pragma once
// Rows of f16 keys and values: from heads to rows, and for single rows' kernel from shared memory
// to tensor-core operands. Rows there begin 16 bytes, modulo 32, behind each other, so that the
// eight rows of an 8 x 8 matrix lie in different banks. Another format is another class like this
// one.

#include "cuda/attention/decode_tiles.cuh"
#include "cuda/attention/heads.cuh"
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
__device__ __forceinline__ void copy_async_16_or_zero(uint32_t to, const void* from, bool copy,
                                                      uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(to),
               "l"(from), "r"(copy ? 16 : 0), "l"(policy)
               : "memory");
}

}  // namespace ptx

// Rows of f16 in shared memory, the 16-byte chunks of row r exchanged by r % 8, so that the eight
// rows of an 8 x 8 matrix lie in different banks.
template <int kDim>
struct F16Rows {
  static constexpr uint32_t kHeadDim = kDim;
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

template <int kDim>
struct KvF16 {
  static constexpr uint32_t kHeadDim = kDim;
  static constexpr uint32_t kBlock = 0;
  static constexpr bool kInBlocks = false;
  static constexpr bool kRotated = false;

  // Of single rows' kernel.
  static constexpr uint32_t kPartDims = part_dims(kDim), kTeam = kDim / kPartDims;
  static constexpr int kDimTiles = kPartDims / 16;
  static constexpr uint32_t kStages = decode_stages(backend::KvFormat::kF16);
  static constexpr uint32_t kPartBytes = part_row_bytes(backend::KvFormat::kF16, kDim);
  static constexpr uint32_t kStride = part_row_stride(backend::KvFormat::kF16, kDim, 0);
  static constexpr int kWeightBits = 0;
  struct Numbers {};

  __device__ static __forceinline__ uint32_t bytes_of(uint32_t dims) { return 2 * dims; }
  __device__ static __forceinline__ uint32_t result_dim(uint32_t tile, uint32_t row) {
    return 16 * tile + row;
  }

  // Where the query has dimension d.
  __device__ static __forceinline__ uint32_t query_place(uint32_t d) { return d; }
  __device__ static __forceinline__ void load_queries(uint32_t queries, uint32_t stride,
                                                      uint32_t lane,
                                                      uint32_t (&to)[2 * kDimTiles]) {
    const uint32_t at = queries + lane % 8 * stride + lane / 8 * 16;
#pragma unroll
    for (int i = 0; i < kDimTiles / 2; ++i) {
      uint32_t four[4];
      ptx::load_matrices(four, at + i * 64);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[4 * i + j] = four[j];
    }
  }

  // Scores of 16 keys, transposed: lane 4 g + t has the keys g and g + 8 by the queries 2t and
  // 2t + 1.
  __device__ static __forceinline__ void scores(const KvTile& keys, uint32_t,
                                                const uint32_t (&queries)[2 * kDimTiles],
                                                uint32_t lane, Numbers&, float (&scores)[4]) {
    const uint32_t at = keys.rows + lane % 16 * kStride + lane / 16 * 16;
    float sums[2][4] = {};  // independent: the instruction's latency is long
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) {
      uint32_t key[4];
      ptx::load_matrices(key, at + i * 32);
      ptx::multiply_add(sums[i % 2], key, queries[2 * i], queries[2 * i + 1]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = sums[0][i] + sums[1][i];
  }

  __device__ static __forceinline__ void take_values(const KvTile&, const WarpShare&, uint32_t,
                                                     Numbers&) {}
  // results[tile] += values by weights, which stand as the second operand of a matrix instruction.
  // Rows g and g + 8 of tile m are dimensions 16 m + g and 16 m + g + 8 of the part, in the order
  // of the key's values on a row.
  __device__ static __forceinline__ void add_values(const KvTile& keys, const KvTile& values,
                                                    const WarpShare& share, uint32_t lane,
                                                    const uint32_t (&weights)[2], const Numbers&,
                                                    float (&results)[kDimTiles][4]) {
    const uint32_t row = lane % 8 + lane / 16 * 8;
    const uint32_t in_tile = row * kStride + lane / 8 % 2 * 16;
#pragma unroll
    for (uint32_t i = 0; i < kDimTiles; ++i) {
      const uint32_t rows = 16 * i < share.own_values ? values.rows : keys.rows;
      uint32_t value[4];
      ptx::load_matrices_transposed(value, rows + in_tile + 32 * i);
      ptx::multiply_add(results[i], value, weights[0], weights[1]);
    }
  }

  // A row's numbers of a head after norm, RoPE and all, dimension d at place(d).
  template <class Head, class Place>
  __device__ static __forceinline__ void put(const Head& head, char* numbers, const Place& place) {
    head.for_each([&](uint32_t d, float x) {
      const uint32_t at = place(d);
      if (at != kNowhere) reinterpret_cast<__half*>(numbers)[at] = __float2half_rn(x);
    });
  }
};

}  // namespace nibble::cuda
