#pragma once
// One head of q, k or v from the linear's sums: norm and RoPE by one warp, in registers. Lane l
// holds the pairs (d, d + head_dim / 2) that turn together, d = l + 32 i.

#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffff;
inline constexpr uint32_t kNowhere = UINT32_MAX;  // a place that a value does not go to

// Over kCount lanes that are neighbours.
template <uint32_t kCount = kLanes>
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (uint32_t step = kCount / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// Cosines and sines of a row's position, the same for all its heads: computed once by the whole
// block.
template <int kHeadDim>
class Turns {
 public:
  // Asks for the first frequency, which doesn't depend on the position.
  __device__ explicit Turns(const AttentionLayer& layer)
      : frequencies_(layer.inverse_frequencies),
        first_(threadIdx.x < kHeadDim / 2 ? frequencies_[threadIdx.x] : 0) {}

  // To shared memory; a barrier must follow.
  __device__ void compute(uint32_t position, float2* turns) const {  // [kHeadDim / 2]
    float frequency = first_;
#pragma unroll 1  // code that runs once is slower to fetch than to run
    for (uint32_t pair = threadIdx.x; pair < kHeadDim / 2;) {
      float2 turn = {1, 0};
      if (frequency != 0) sincosf(float(position) * frequency, &turn.y, &turn.x);
      turns[pair] = turn;
      pair += blockDim.x;
      if (pair < kHeadDim / 2) frequency = frequencies_[pair];
    }
  }

 private:
  const float* frequencies_;
  float first_;
};

enum class HeadKind { kQuery, kKey, kValue };

// kShared: for layers that may have shared rows.
template <int kHeadDim, bool kShared = false>
class WarpHead {
  static constexpr int kPairs = kHeadDim / 64;

 public:
  WarpHead() = default;
  // Head `index` of its kind. Norm weights are read here, before the wait for the sums.
  __device__ WarpHead(const AttentionLayer& layer, HeadKind kind, uint32_t index, uint32_t lane)
      : kind_(kind), lane_(lane) {
    const backend::AttentionShape& shape = layer.shape;
    column_ = index;
    if (kind != HeadKind::kQuery) column_ += shape.query_heads;
    if (kind == HeadKind::kValue && !layer.value_is_key) column_ += shape.kv_heads;
    column_ *= kHeadDim;
    const float* const weight = norm(layer).weight;
    // A shared row has the key without its norm's weight, but for the RoPE block.
    const uint32_t rope_half = layer.kv.order.rope_dims / 2;
    const float* const key_weight =
        kShared && kind == HeadKind::kQuery && layer.kv.shared ? layer.key_norm.weight : nullptr;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t d = lane + 32 * i;
      weight_low_[i] = weight ? weight[d] : 1.0f;
      weight_high_[i] = weight ? weight[d + kHeadDim / 2] : 1.0f;
      if constexpr (kShared) {
        key_weight_low_[i] = key_weight && d >= rope_half ? key_weight[d] : 1.0f;
        key_weight_high_[i] = key_weight && d >= rope_half ? key_weight[d + kHeadDim / 2] : 1.0f;
      }
    }
  }

  // Adds the parts of the row's sums.
  __device__ void load(const AttentionArgs& step, uint32_t rows, uint32_t row) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low_[i] = high_[i] = 0;
    const float* from = step.sums + uint64_t(row) * step.stride + column_ + lane_;
    const uint64_t part_stride = uint64_t(rows) * step.stride;
    for (uint32_t part = 0; part < step.parts; part += 2) {
      const bool pair = part + 1 < step.parts;  // sums that were added before come in one part
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        const float* const low = from + 32 * i;
        const float* const high = low + kHeadDim / 2;
        low_[i] += low[0] + (pair ? low[part_stride] : 0.0f);
        high_[i] += high[0] + (pair ? high[part_stride] : 0.0f);
      }
      from += 2 * part_stride;
    }
  }

  // Norm and RoPE; queries ready for the layer's rows.
  __device__ void finish(const AttentionLayer& layer, const float2* turns) {
    normalise(layer);
    weigh();
    rotate(turns);
    if (kind_ == HeadKind::kQuery) scale(layer);
  }

  // Its parts: the norm without its weight, the weight, RoPE of queries and keys. Then queries
  // times scale * log2(e), so that softmax is a power of 2, and the weights that their keys have
  // not.
  __device__ void scale(const AttentionLayer& layer) {
    constexpr float kLog2E = 1.4426950408889634f;
    const float scale = layer.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low_[i] *= kShared ? scale * key_weight_low_[i] : scale;
      high_[i] *= kShared ? scale * key_weight_high_[i] : scale;
    }
  }
  __device__ void normalise(const AttentionLayer& layer) {
    const HeadNorm& norm = this->norm(layer);
    if (!norm.enabled) return;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) squares += low_[i] * low_[i] + high_[i] * high_[i];
    squares = warp_sum(squares);
    const float scale = 1.0f / sqrtf(squares / kHeadDim + norm.epsilon);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low_[i] *= scale;
      high_[i] *= scale;
    }
  }
  __device__ void weigh() {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low_[i] *= weight_low_[i];
      high_[i] *= weight_high_[i];
    }
  }
  __device__ void rotate(const float2* turns) {
    if (kind_ == HeadKind::kValue) return;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float x = low_[i], y = high_[i];
      const float2 turn = turns[lane_ + 32 * i];  // cosine, sine
      low_[i] = x * turn.x - y * turn.y;
      high_[i] = y * turn.x + x * turn.y;
    }
  }

  // body(d, x) for the lane's values: x is dimension d.
  template <class Body>
  __device__ __forceinline__ void for_each(const Body& body) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t d = lane_ + 32 * i;
      body(d, low_[i]);
      body(d + kHeadDim / 2, high_[i]);
    }
  }

 private:
  __device__ const HeadNorm& norm(const AttentionLayer& layer) const {
    if (kind_ == HeadKind::kQuery) return layer.query_norm;
    return kind_ == HeadKind::kKey ? layer.key_norm : layer.value_norm;
  }

  HeadKind kind_;
  uint32_t column_, lane_;
  float low_[kPairs], high_[kPairs];
  float weight_low_[kPairs], weight_high_[kPairs];
  float key_weight_low_[kShared ? kPairs : 1], key_weight_high_[kShared ? kPairs : 1];  // a query's
};

}  // namespace nibble::cuda
