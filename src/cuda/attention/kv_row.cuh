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

  // Which values of a row: all of one that is a key or a value; of a shared row the value, or the
  // RoPE block as the key has it.
  struct Part {
    uint32_t begin, end;
    bool turned;  // the RoPE block
  };
  // The parts that a KV head has at a position, part_count() in all.
  __device__ Part part(uint32_t index) const {
    const uint32_t rope_dims = layer_.kv.order.rope_dims;
    if (index == 0 || !layer_.kv.shared) return {rope_dims, Kv::kHeadDim + rope_dims, false};
    return {0, rope_dims, true};
  }
  __device__ uint32_t part_count() const {
    return layer_.kv.shared && layer_.kv.order.rope_dims == 0 ? 1 : 2;
  }

  // Norm and RoPE. Of a shared row's value, no more than the norm.
  __device__ void turn(Head& head, bool weighed) const {
    head.normalise(layer_);
    if (!weighed) return;
    head.weigh();
    head.rotate(turns_);
  }

  // place(d): where the f16 goes that meets value d of a key's row. Eight that begin at a multiple
  // of eight go side by side.
  template <class Place>
  __device__ void put_query(Head& head, const Place& place) const {
    const backend::SharedKvRow order = this->order();
    head.scale(layer_);
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

  // To a row: the part of it that the head is.
  __device__ void put_part(const Head& head, const Part& part, const KvRow& to) const {
    const backend::SharedKvRow order = this->order();
    const auto place = [&](uint32_t d) {
      // Beyond the RoPE block a key's dimension is what the value's is.
      const uint32_t at = part.turned ? order.key_place(d) : order.value_place(d);
      return at < part.end ? at - part.begin : kNowhere;
    };
    if constexpr (Kv::kInBlocks) {
      stage(head, place);
      __syncwarp();
      Kv::encode(staged_, part.begin, part.end, to, lane_);
    } else {
      Kv::put(head, to.numbers + Kv::bytes_of(part.begin), place);
    }
    __syncwarp();
  }

 private:
  __device__ __forceinline__ backend::SharedKvRow order() const {
    return {Kv::kHeadDim, layer_.kv.order.rope_dims};
  }
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
