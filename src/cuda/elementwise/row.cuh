#pragma once
// A row of activations in the registers of a block (or of a cluster of blocks, side by side).
//
// Warp w of the row's warps has the 256-column tiles w, w + warps, ...; of each, a lane has 8
// consecutive columns: what one 16-byte store of the activation layout takes. Eight small blocks
// are through a row sooner than one large one (docs/measurements/decode.md).

#include <cooperative_groups.h>

#include "cuda/elementwise/elementwise.h"
#include "cuda/layouts/activations.cuh"
#include "cuda/ptx.cuh"

namespace nibble::cuda {

inline constexpr uint32_t kMostWarps = 32;

// Most blocks of a cluster, which every device with clusters has.
inline constexpr uint32_t kMostBlocks = 8;

// Position of a row's block in its cluster; 0 of 1 where there are no clusters.
struct ClusterPlace {
#if __CUDA_ARCH__ >= 900
  uint32_t rank = cooperative_groups::this_cluster().block_rank();
  uint32_t blocks = cooperative_groups::this_cluster().num_blocks();
#else
  uint32_t rank = 0;
  uint32_t blocks = 1;
#endif
};

// All blocks of the cluster have come here, and see what the others wrote before.
__device__ __forceinline__ void cluster_sync(const ClusterPlace& place) {
#if __CUDA_ARCH__ >= 900
  if (place.blocks > 1) {
    cooperative_groups::this_cluster().sync();
    return;
  }
#endif
  __syncthreads();
}

// The same shared variable in another block of the cluster.
template <class T>
__device__ __forceinline__ T* cluster_shared(const ClusterPlace& place, T* local, uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  if (place.blocks > 1) return cooperative_groups::this_cluster().map_shared_rank(local, rank);
#endif
  return local;
}

template <int kTiles>
struct Row {
  float values[kTiles][kPieceColumns];
};

// body(i, column) for the lane's pieces of a row of `width` columns: values[i] are those from
// `column` on. Whole warps take part, also in a last tile that ends within them.
template <int kTiles, class Body>
__device__ __forceinline__ void for_each_piece(const ClusterPlace& place, uint32_t width,
                                               const Body& body) {
  const uint32_t tiles = (width + kTileColumns - 1) / kTileColumns;
  const uint32_t block_warps = blockDim.x / kLanes;
  const uint32_t warp = place.rank * block_warps + threadIdx.x / kLanes;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const uint32_t tile = warp + i * place.blocks * block_warps;
    if (tile < tiles) body(i, tile * kTileColumns + threadIdx.x % kLanes * kPieceColumns);
  }
}

// values = row[column, column + 8), zero from `width` on.
__device__ __forceinline__ void load_piece(const float* row, uint32_t column, uint32_t width,
                                           float (&values)[kPieceColumns]) {
  float4 low = {}, high = {};
  if (column < width) {
    low = reinterpret_cast<const float4*>(row + column)[0];
    high = reinterpret_cast<const float4*>(row + column)[1];
  }
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

__device__ __forceinline__ void store_piece(float* row, uint32_t column, uint32_t width,
                                            const float (&values)[kPieceColumns]) {
  if (column >= width) return;
  float4* const to = reinterpret_cast<float4*>(row + column);
  to[0] = {values[0], values[1], values[2], values[3]};
  to[1] = {values[4], values[5], values[6], values[7]};
}

// The sum of the parts of columns [column, column + 8) of a row, times its scale; zero from
// `width` on. `offset` is where the columns begin.
__device__ __forceinline__ void load_sums(const Sums& sums, float scale, uint32_t row,
                                          uint32_t offset, uint32_t column, uint32_t width,
                                          float (&values)[kPieceColumns]) {
  const float* from = sums.values + uint64_t(row) * sums.stride + offset;
  const uint64_t part_stride = uint64_t(sums.rows) * sums.stride;
  // So many parts are in flight: two is what a decode step's matrices mostly leave.
  const auto add_parts = [&]<uint32_t kTogether>() {
    float pieces[kTogether][kPieceColumns] = {};
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i)
      load_piece(from + i * part_stride, column, width, pieces[i]);
#pragma unroll
    for (uint32_t i = 0; i < kTogether; ++i) {
#pragma unroll
      for (uint32_t j = 0; j < kPieceColumns; ++j) values[j] += pieces[i][j];
    }
    from += kTogether * part_stride;
  };
#pragma unroll
  for (float& value : values) value = 0;
  uint32_t parts = sums.parts;
  for (; parts >= 4; parts -= 4) add_parts.template operator()<4>();
  if (parts & 2) add_parts.template operator()<2>();
  if (parts & 1) add_parts.template operator()<1>();
#pragma unroll
  for (float& value : values) value *= scale;
}

__device__ __forceinline__ void load_weight(const DeviceNorm& norm, uint32_t column, uint32_t width,
                                            float (&values)[kPieceColumns]) {
  if (norm.weight) return load_piece(norm.weight, column, width, values);
#pragma unroll
  for (float& value : values) value = 1;
}

// What a row's lanes find out together: kSums sums, then kLargest largest values.
template <int kSums, int kLargest>
struct RowFacts {
  float values[kSums + kLargest];

  __device__ __forceinline__ void add(const RowFacts& other) {
#pragma unroll
    for (int i = 0; i < kSums + kLargest; ++i)
      values[i] = i < kSums ? values[i] + other.values[i] : fmaxf(values[i], other.values[i]);
  }
};

template <class Facts>
__device__ __forceinline__ Facts over_lanes(Facts facts) {
#pragma unroll
  for (uint32_t distance = kLanes / 2; distance > 0; distance /= 2) {
    Facts other = facts;
#pragma unroll
    for (float& value : other.values) value = __shfl_xor_sync(~0u, value, distance);
    facts.add(other);
  }
  return facts;
}

template <class Facts>
struct ReduceShared {  // used by one call alone
  Facts warps[kMostWarps];
  Facts blocks[kMostBlocks];
};
// The cluster's blocks must have met before: each writes to the others' shared memory. All lanes of
// the row come to the same bits.
template <class Facts>
__device__ __forceinline__ Facts reduce_row(const ClusterPlace& place, Facts own,
                                            ReduceShared<Facts>& shared) {
  own = over_lanes(own);
  const uint32_t lane = threadIdx.x % kLanes;
  if (lane == 0) shared.warps[threadIdx.x / kLanes] = own;
  __syncthreads();
  own = over_lanes(lane < blockDim.x / kLanes ? shared.warps[lane] : Facts{});
  if (place.blocks == 1) return own;
  if (threadIdx.x < place.blocks)
    *cluster_shared(place, &shared.blocks[place.rank], threadIdx.x) = own;
  cluster_sync(place);
  return over_lanes(lane < place.blocks ? shared.blocks[lane] : Facts{});
}

// The power of two that brings `largest` into f16's range: 1 when it is there.
__device__ __forceinline__ float range_scale(float largest) {
  if (!(largest > kLargestHalf)) return 1;
  const uint32_t exponent = __float_as_uint(largest) >> 23;
  return __uint_as_float((exponent - 14) << 23);
}

// normed = factor * x * weight, for the row that the cluster has in its registers.
template <int kTiles>
__device__ __forceinline__ void store_row(const ClusterPlace& place, const Row<kTiles>& x,
                                          const Row<kTiles>& weight, float factor, float scale,
                                          uint32_t width, const ScaledRows& normed, uint32_t row) {
  const float inverse_scale = 1 / scale;
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t column) {
    float values[kPieceColumns];
#pragma unroll
    for (uint32_t j = 0; j < kPieceColumns; ++j)
      values[j] = x.values[i][j] * factor * weight.values[i][j] * inverse_scale;
    if constexpr (kTiles == 1) {
      store_activation_tile(normed.rows, row, column, values);
    } else {  // measured: batches.md
      store_activations(normed.rows, row, column, values);
    }
  });
  if (place.rank == 0 && threadIdx.x == 0) normed.scales[row] = scale;
}

// normed = norm(x)
template <int kTiles>
__device__ __forceinline__ void store_normed(const ClusterPlace& place, const Row<kTiles>& x,
                                             const Row<kTiles>& weight, float epsilon,
                                             uint32_t width, const ScaledRows& normed, uint32_t row,
                                             ReduceShared<RowFacts<1, 1>>& shared) {
  RowFacts<1, 1> own = {};
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t) {
#pragma unroll
    for (uint32_t j = 0; j < kPieceColumns; ++j) {
      const float value = x.values[i][j];
      own.values[0] += value * value;
      own.values[1] = fmaxf(own.values[1], fabsf(value * weight.values[i][j]));
    }
  });
  const auto [squares, largest] = reduce_row(place, own, shared).values;
  const float factor = 1 / sqrtf(squares / float(width) + epsilon);
  store_row(place, x, weight, factor, range_scale(largest * factor), width, normed, row);
}

// A norm's weights for the lane's pieces: constants, to be loaded before the wait for the kernel in
// front.
template <int kTiles>
__device__ __forceinline__ Row<kTiles> load_weights(const ClusterPlace& place,
                                                    const DeviceNorm& norm, uint32_t width) {
  Row<kTiles> weights;
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t column) {
    load_weight(norm, column, width, weights.values[i]);
  });
  return weights;
}

}  // namespace nibble::cuda
