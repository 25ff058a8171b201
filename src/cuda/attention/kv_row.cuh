#pragma once
// What rows of keys and values have in common, whatever their format: where they lie, in what order
// their values are, how heads become rows and queries that fit them.

#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"

namespace nibble::cuda {

// The dimension that stands at `index` of a value's window on a row: the inverse of value_place().
__device__ __forceinline__ uint32_t value_dim(const backend::SharedKvRow& order, uint32_t index) {
  const uint32_t half = order.head_dim / 2, rope_half = order.rope_dims / 2;
  const uint32_t others = half - rope_half;
  if (index < 2 * others) {
    const uint32_t upper = index < others ? 0 : 1;
    return upper * half + rope_half + index - upper * others;
  }
  const uint32_t upper = index - 2 * others < rope_half ? 0 : 1;
  return upper * half + index - 2 * others - upper * rope_half;
}
// The dimension that stands at `index` of a key: the inverse of key_place().
__device__ __forceinline__ uint32_t key_dim(const backend::SharedKvRow& order, uint32_t index) {
  const uint32_t of_value = index < order.rope_dims ? index + order.head_dim : index;
  return value_dim(order, of_value - order.value_begin());
}

// Neighbours on a row that a lane has of it, where a warp turns blocks or compresses them. A block
// is of that many or more, and so are the pieces that value_dim() leaves in order.
inline constexpr uint32_t kLaneValues = 16;

// Loads the lane's values of those that a RowMaker staged.
__device__ __forceinline__ void load_staged(const float* staged, uint32_t first,
                                            float (&x)[kLaneValues]) {
  const float4* const from = reinterpret_cast<const float4*>(staged + staged_place(first));
#pragma unroll
  for (uint32_t i = 0; i < kLaneValues / 4; ++i) {
    const float4 four = from[i];
    x[4 * i] = four.x, x[4 * i + 1] = four.y, x[4 * i + 2] = four.z, x[4 * i + 3] = four.w;
  }
}

// What a warp makes of heads: rows, and the queries that are multiplied with them.
template <class Kv>
class RowMaker {
  using Head = WarpHead<Kv::kHeadDim, true>;

 public:
  // `staged`: f32 [staged_floats()] of this warp in shared memory; formats without blocks need
  // none.
  __device__ RowMaker(const AttentionLayer& layer, const float2* turns, float* staged,
                      uint32_t lane)
      : layer_(layer), turns_(turns), staged_(staged), lane_(lane) {}

  // place(d): where the f16 goes that meets value d of a key's row. Eight that begin at a multiple
  // of eight go side by side.
  template <class Place>
  __device__ void make_query(Head& head, const Place& place) const {
    const backend::SharedKvRow& order = layer_.kv.order;
    head.finish(layer_, turns_);
    if constexpr (Kv::kRotated) {
      stage(head, [&](uint32_t d) { return order.key_place(d); });
      __syncwarp();
      const uint32_t first = lane_ * kLaneValues;
      float x[kLaneValues] = {};
      if (first < Kv::kHeadDim) load_staged(staged_, first, x);
      Kv::Codec::template rotate<Kv::kBlock>(x, lane_);
      if (first < Kv::kHeadDim) {
#pragma unroll
        for (uint32_t i = 0; i < kLaneValues; i += 8) {
          __half2 eight[4];
#pragma unroll
          for (uint32_t j = 0; j < 4; ++j)
            eight[j] = __floats2half2_rn(x[i + 2 * j], x[i + 2 * j + 1]);
          *reinterpret_cast<uint4*>(place(first + i)) = *reinterpret_cast<const uint4*>(eight);
        }
      }
      __syncwarp();
    } else {
      head.for_each([&](uint32_t d, float x) { *place(order.key_place(d)) = __float2half_rn(x); });
    }
  }

  // Of a key or value, or of the key of shared rows.
  __device__ void make_row(Head& head, const KvRow& to) const {
    const backend::SharedKvRow& order = layer_.kv.order;
    const auto put = [&](const auto& place) {
      if constexpr (Kv::kInBlocks) {
        stage(head, place);
      } else {
        Kv::put(head, to.numbers, place);
      }
    };
    if (layer_.kv.shared) {
      head.normalise(layer_);
      put([&](uint32_t d) { return order.value_place(d); });
      if (order.rope_dims > 0) {
        head.weigh();
        head.rotate(turns_);
        // Beyond the RoPE block a key's dimension is what the value's is: it stands there already.
        put([&](uint32_t d) {
          const uint32_t place = order.key_place(d);
          return place < order.rope_dims ? place : kNowhere;
        });
      }
    } else {
      head.finish(layer_, turns_);
      put([](uint32_t d) { return d; });
    }
    __syncwarp();
    if constexpr (Kv::kInBlocks) {
      Kv::encode(staged_, order.values(), to, lane_);
      __syncwarp();
    }
  }

 private:
  template <class Place>
  __device__ __forceinline__ void stage(const Head& head, const Place& place) const {
    head.for_each([&](uint32_t d, float x) {
      const uint32_t at = place(d);
      if (at != kNowhere) staged_[staged_place(at)] = x;
    });
  }

  const AttentionLayer& layer_;
  const float2* turns_;
  float* staged_;
  uint32_t lane_;
};

}  // namespace nibble::cuda
