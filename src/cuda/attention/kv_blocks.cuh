#pragma once
// Rows of compressed keys and values: numbers of a few bits, a scale for each block of them. From
// shared memory to tensor-core operands, in registers alone.
//
// A Codec says what eight numbers are. A lane reads numbers that lie side by side, eight at a time,
// as its share of a block's dimensions: their order does not matter to a product as long as the
// query has the same. What stands as keys x dimensions is transposed in registers to be values.
// Where rows serve both, that is all: numbers are decoded once. A scale multiplies the product with
// its block of a key, or the weight of its block of a value. Rows in shared memory begin so far
// behind each other that every read below is free of bank conflicts (part_row_stride()).

#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/kv_row.cuh"

namespace nibble::cuda {

template <class C, int kDim, int kBlockValues>
struct KvBlocks {
  using Codec = C;
  static constexpr uint32_t kHeadDim = kDim;
  static constexpr uint32_t kBlock = kBlockValues;
  static constexpr bool kInBlocks = true;
  static constexpr bool kRotated = Codec::kRotated;

  // Of single rows' kernel.
  static constexpr uint32_t kPartDims = part_dims(kDim), kTeam = kDim / kPartDims;
  static constexpr int kDimTiles = kPartDims / 16;
  static constexpr uint32_t kStages = decode_stages(Codec::kFormat);
  static constexpr uint32_t kPartBytes = part_row_bytes(Codec::kFormat, kDim);
  static constexpr uint32_t kStride = part_row_stride(Codec::kFormat, kDim, kBlock);
  // Weights are so many powers of two larger: times a scale they still are f16 of full precision.
  static constexpr int kWeightBits = 8;

  static constexpr uint32_t kBlockBytes = kBlock / 8 * Codec::kEightWords * 4;
  static constexpr uint32_t kBlocks = kPartDims / kBlock;
  static constexpr uint32_t kLaneDims = kBlock / 4, kEights = kLaneDims / 8;  // of a block

  __device__ static __forceinline__ uint32_t bytes_of(uint32_t dims) {
    return dims / 8 * (Codec::kEightWords * 4);
  }

  // A warp's numbers of 16 rows as f16: left operands of 16 keys x 16 dimensions.
  struct Numbers {
    __half2 of[kDimTiles][4];
  };

  // Where the query has dimension d, so that a lane finds its share of a block's eights side by
  // side: chunks of eight as [block][eight][lane].
  __device__ static __forceinline__ uint32_t query_place(uint32_t d) {
    const uint32_t block = d / kBlock, lane = d % kBlock / kLaneDims, eight = d % kLaneDims / 8;
    return ((block * kEights + eight) * 4 + lane) * 8 + d % 8;
  }
  __device__ static __forceinline__ void load_queries(uint32_t queries, uint32_t stride,
                                                      uint32_t lane,
                                                      uint32_t (&to)[2 * kDimTiles]) {
    const uint32_t at = queries + lane / 4 * stride + lane % 4 * 16;
#pragma unroll
    for (int i = 0; i < kDimTiles / 2; ++i) {
      uint32_t four[4];
      ptx::load_shared(four, at + i * 64);
#pragma unroll
      for (int j = 0; j < 4; ++j) to[4 * i + j] = four[j];
    }
  }

  // Scores of 16 keys, transposed: lane 4 g + t has the keys g and g + 8 by the queries 2t and
  // 2t + 1. `first_dim`: of the part.
  __device__ static __forceinline__ void scores(const KvTile& keys, uint32_t first_dim,
                                                const uint32_t (&queries)[2 * kDimTiles],
                                                uint32_t lane, Numbers& numbers,
                                                float (&scores)[4]) {
    const uint32_t scale_at = keys.scales + lane / 4 * keys.scale_stride + first_dim / kBlock * 2;
#pragma unroll
    for (float& score : scores) score = 0;
#pragma unroll
    for (uint32_t block = 0; block < kBlocks; ++block) {
      decode(keys, block, lane, numbers);
      const float low_scale = __half2float(ptx::load_shared_half(scale_at + 2 * block));
      const float high_scale =
          __half2float(ptx::load_shared_half(scale_at + 8 * keys.scale_stride + 2 * block));
      float sums[2][4] = {};  // independent: the instruction's latency is long
#pragma unroll
      for (uint32_t i = block * kBlockTiles; i < (block + 1) * kBlockTiles; ++i)
        ptx::multiply_add(sums[i % 2], numbers.of[i], queries[2 * i], queries[2 * i + 1]);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        scores[i] += (sums[0][i] + sums[1][i]) * (i < 2 ? low_scale : high_scale);
    }
  }

  // Where a part's values are not what the keys are, they take the place of what scores() left.
  __device__ static __forceinline__ void take_values(const KvTile& values, const WarpShare& share,
                                                     uint32_t lane, Numbers& numbers) {
#pragma unroll
    for (uint32_t block = 0; block < kBlocks; ++block)
      if (block * kBlock < share.own_values) decode(values, block, lane, numbers);
  }

  // results[tile] += values by weights, which stand as the second operand of a matrix instruction.
  __device__ static __forceinline__ void add_values(const KvTile&, const KvTile& values,
                                                    const WarpShare& share, uint32_t lane,
                                                    const uint32_t (&weights)[2],
                                                    const Numbers& numbers,
                                                    float (&results)[kDimTiles][4]) {
    const uint32_t scale_at = values.scales + lane % 4 * 2 * values.scale_stride;
#pragma unroll
    for (uint32_t block = 0; block < kBlocks; ++block) {
      const uint32_t dim = block * kBlock + (block * kBlock < share.own_values ? share.value_begin
                                                                               : share.first_dim);
      uint32_t scaled[2];
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        const uint32_t at = scale_at + 8 * half * values.scale_stride + dim / kBlock * 2;
        const __half2 scales = __halves2half2(ptx::load_shared_half(at),
                                              ptx::load_shared_half(at + values.scale_stride));
        scaled[half] = ptx::as_bits(__hmul2(ptx::as_half2(weights[half]), scales));
      }
#pragma unroll
      for (uint32_t i = block * kBlockTiles; i < (block + 1) * kBlockTiles; ++i) {
        constexpr int kTransposed[4] = {0, 2, 1, 3};
        uint32_t value[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          value[j] = ptx::transpose_matrix(ptx::as_bits(numbers.of[i][kTransposed[j]]));
        ptx::multiply_add(results[i], value, scaled[0], scaled[1]);
      }
    }
  }

  // The dimension of a value, in the order of the key's values on a row, that results have in row
  // `row` of a tile, one of all the head's.
  __device__ static __forceinline__ uint32_t result_dim(uint32_t tile, uint32_t row) {
    const uint32_t eight = tile / 2, pair = tile % 2 * 2 + row / 8;
    return eight / kEights * kBlock + row % 8 / 2 * kLaneDims + eight % kEights * 8 + pair * 2 +
           row % 2;
  }

  // Makes numbers and scales of the values [begin, end) of a row, which are staged; by one warp.
  __device__ static void encode(const float* staged, uint32_t begin, uint32_t end, const KvRow& to,
                                uint32_t lane) {
#pragma unroll 1  // once
    for (uint32_t some = begin; some < end; some += kLanes * kLaneValues) {
      const uint32_t first = some + lane * kLaneValues;
      float x[kLaneValues] = {};
      if (first < end) load_staged(staged, first - begin, x);
      using Words = uint32_t[2 * Codec::kEightWords];
      alignas(16) Words words;
      const float scale = Codec::template encode<kBlock>(x, words, lane);
      if (first >= end) continue;
      char* const numbers = to.numbers + bytes_of(first);
      if constexpr (sizeof(Words) == 16) {
        *reinterpret_cast<uint4*>(numbers) = {words[0], words[1], words[2], words[3]};
      } else {
        *reinterpret_cast<uint2*>(numbers) = {words[0], words[1]};
      }
      if (first % kBlock == 0) to.scales[first / kBlock] = __float2half_rn(scale);
    }
  }

 private:
  static constexpr uint32_t kBlockTiles = kBlock / 16;

  // A block of 16 rows.
  __device__ static __forceinline__ void decode(const KvTile& rows, uint32_t block, uint32_t lane,
                                                Numbers& numbers) {
    constexpr uint32_t kWords = kEights * Codec::kEightWords;
    const uint32_t at =
        rows.rows + lane / 4 * kStride + lane % 4 * (kWords * 4) + block * kBlockBytes;
    uint32_t low[kWords], high[kWords];
    ptx::load_shared(low, at);
    ptx::load_shared(high, at + 8 * kStride);
#pragma unroll
    for (uint32_t eight = 0; eight < kEights; ++eight) {
      __half2 a[4], b[4];
      Codec::decode(low + eight * Codec::kEightWords, a);
      Codec::decode(high + eight * Codec::kEightWords, b);
#pragma unroll
      for (uint32_t half = 0; half < 2; ++half) {
        __half2(&to)[4] = numbers.of[block * kBlockTiles + 2 * eight + half];
        to[0] = a[2 * half];
        to[1] = b[2 * half];
        to[2] = a[2 * half + 1];
        to[3] = b[2 * half + 1];
      }
    }
  }
};

}  // namespace nibble::cuda
