#pragma once
// One head of q, k or v from the linear's sums: norm and RoPE by one warp, in registers. Lane l
// holds the pairs (d, d + head_dim / 2) that turn together, d = l + 32 i.

#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffff;

// Cosines and sines of a row's position, the same for all its heads: computed once by the block's
// kThreads threads.
template <int kHeadDim, uint32_t kThreads>
class Turns {
  static constexpr uint32_t kEach = (kHeadDim / 2 + kThreads - 1) / kThreads;

 public:
  // Asks for the frequencies, which don't depend on the position.
  __device__ explicit Turns(const AttentionLayer& layer) {
#pragma unroll
    for (uint32_t i = 0; i < kEach; ++i) {
      const uint32_t pair = i * kThreads + threadIdx.x;
      frequencies_[i] = pair < kHeadDim / 2 ? layer.inverse_frequencies[pair] : 0;
    }
  }

  // To shared memory; a barrier must follow.
  __device__ void compute(uint32_t position, float2 (&turns)[kHeadDim / 2]) const {
#pragma unroll 1  // code that runs once is slower to fetch than to run
    for (uint32_t i = 0; i < kEach; ++i) {
      const uint32_t pair = i * kThreads + threadIdx.x;
      float2 turn = {1, 0};
      const float frequency = i == 0 ? frequencies_[0] : frequencies_[kEach - 1];
      if (frequency != 0) sincosf(float(position) * frequency, &turn.y, &turn.x);
      if (pair < kHeadDim / 2) turns[pair] = turn;
    }
  }

 private:
  static_assert(kEach <= 2);
  float frequencies_[kEach];
};

enum class HeadKind { kQuery, kKey, kValue };

template <int kHeadDim>
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
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      weight_low_[i] = weight ? weight[lane + 32 * i] : 1.0f;
      weight_high_[i] = weight ? weight[lane + 32 * i + kHeadDim / 2] : 1.0f;
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

  // Norm and RoPE. Queries come out multiplied by scale * log2(e), so that softmax is a power of 2.
  __device__ void finish(const AttentionLayer& layer, const float2 (&turns)[kHeadDim / 2]) {
    const HeadNorm& norm = this->norm(layer);
    if (norm.enabled) normalise(norm.epsilon);
    if (kind_ != HeadKind::kValue) rotate(turns);
    if (kind_ != HeadKind::kQuery) return;
    constexpr float kLog2E = 1.4426950408889634f;
    const float scale = layer.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low_[i] *= scale;
      high_[i] *= scale;
    }
  }

  // As f16, dimension d at place(d).
  template <class Place>
  __device__ void store(const Place& place) const {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t d = lane_ + 32 * i;
      *place(d) = __float2half_rn(low_[i]);
      *place(d + kHeadDim / 2) = __float2half_rn(high_[i]);
    }
  }
  // Chunks of 16 bytes change places by `swizzle`.
  __device__ void store(void* row, uint32_t swizzle) const {
    __half* const to = static_cast<__half*>(row);
    store([&](uint32_t d) { return to + ((d / 8) ^ swizzle) * 8 + d % 8; });
  }

 private:
  __device__ const HeadNorm& norm(const AttentionLayer& layer) const {
    if (kind_ == HeadKind::kQuery) return layer.query_norm;
    return kind_ == HeadKind::kKey ? layer.key_norm : layer.value_norm;
  }

  __device__ void normalise(float epsilon) {
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) squares += low_[i] * low_[i] + high_[i] * high_[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
    const float scale = 1.0f / sqrtf(squares / kHeadDim + epsilon);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low_[i] *= scale * weight_low_[i];
      high_[i] *= scale * weight_high_[i];
    }
  }

  __device__ void rotate(const float2 (&turns)[kHeadDim / 2]) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float x = low_[i], y = high_[i];
      const float2 turn = turns[lane_ + 32 * i];  // cosine, sine
      low_[i] = x * turn.x - y * turn.y;
      high_[i] = y * turn.x + x * turn.y;
    }
  }

  HeadKind kind_;
  uint32_t column_, lane_;
  float low_[kPairs], high_[kPairs];
  float weight_low_[kPairs], weight_high_[kPairs];
};

}  // namespace nibble::cuda
