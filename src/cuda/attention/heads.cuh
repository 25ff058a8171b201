#pragma once
// One head of q, k or v from the linear's sums: norm and RoPE by one warp, in registers. Lane l
// holds the pairs (d, d + head_dim / 2) that turn together, d = l + 32 i.

#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {

inline constexpr uint32_t kAllLanes = 0xffffffff;

// Cosines and sines of a position: the same for all heads of a row.
template <int kHeadDim>
struct Turn {
  static constexpr int kPairs = kHeadDim / 64;
  float cosine[kPairs], sine[kPairs];

  __device__ Turn(const float* inverse_frequencies, uint32_t position, uint32_t lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float frequency = inverse_frequencies[lane + 32 * i];
      cosine[i] = 1;
      sine[i] = 0;
      if (frequency != 0) sincosf(float(position) * frequency, &sine[i], &cosine[i]);
    }
  }
};

template <int kHeadDim>
struct WarpHead {
  static constexpr int kPairs = kHeadDim / 64;
  float low[kPairs], high[kPairs];

  // Adds the parts of the sums of `row` that begin at `column`.
  __device__ void load(const AttentionArgs& step, uint32_t rows, uint32_t row, uint32_t column,
                       uint32_t lane) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) low[i] = high[i] = 0;
    const float* from = step.sums + uint64_t(row) * step.stride + column + lane;
    for (uint32_t part = 0; part < step.parts; ++part) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        low[i] += from[32 * i];
        high[i] += from[32 * i + kHeadDim / 2];
      }
      from += uint64_t(rows) * step.stride;
    }
  }

  __device__ void normalise(const HeadNorm& norm, uint32_t lane) {
    if (!norm.enabled) return;
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) squares += low[i] * low[i] + high[i] * high[i];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) squares += __shfl_xor_sync(kAllLanes, squares, step);
    const float scale = 1.0f / sqrtf(squares / kHeadDim + norm.epsilon);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t at = lane + 32 * i;
      low[i] *= scale * (norm.weight ? norm.weight[at] : 1.0f);
      high[i] *= scale * (norm.weight ? norm.weight[at + kHeadDim / 2] : 1.0f);
    }
  }

  __device__ void rotate(const Turn<kHeadDim>& turn) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const float x = low[i], y = high[i];
      low[i] = x * turn.cosine[i] - y * turn.sine[i];
      high[i] = y * turn.cosine[i] + x * turn.sine[i];
    }
  }

  __device__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      low[i] *= factor;
      high[i] *= factor;
    }
  }

  // As f16; chunks of 16 bytes change places by `swizzle`.
  __device__ void store(void* row, uint32_t swizzle, uint32_t lane) const {
    __half* const to = static_cast<__half*>(row);
    const auto place = [&](uint32_t d) { return ((d / 8) ^ swizzle) * 8 + d % 8; };
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const uint32_t at = lane + 32 * i;
      to[place(at)] = __float2half_rn(low[i]);
      to[place(at + kHeadDim / 2)] = __float2half_rn(high[i]);
    }
  }
};

// What becomes of one row's sums. Queries come out multiplied by scale * log2(e), so that
// softmax is a power of two.
template <int kHeadDim>
class RowHeads {
 public:
  __device__ RowHeads(const AttentionKernelArgs& args, uint32_t row, uint32_t lane)
      : args_(args),
        row_(row),
        lane_(lane),
        turn_(args.layer.inverse_frequencies, args.step.places[row].position, lane) {}

  __device__ WarpHead<kHeadDim> query(uint32_t head) const {
    constexpr float kLog2E = 1.4426950408889634f;
    WarpHead<kHeadDim> result = load(head);
    result.normalise(args_.layer.query_norm, lane_);
    result.rotate(turn_);
    result.scale(args_.layer.scale * kLog2E);
    return result;
  }
  __device__ WarpHead<kHeadDim> key(uint32_t kv_head) const {
    WarpHead<kHeadDim> result = load(args_.layer.shape.query_heads + kv_head);
    result.normalise(args_.layer.key_norm, lane_);
    result.rotate(turn_);
    return result;
  }
  __device__ WarpHead<kHeadDim> value(uint32_t kv_head) const {
    const backend::AttentionShape& shape = args_.layer.shape;
    const uint32_t first = shape.query_heads + (args_.layer.value_is_key ? 0 : shape.kv_heads);
    WarpHead<kHeadDim> result = load(first + kv_head);
    result.normalise(args_.layer.value_norm, lane_);
    return result;
  }

 private:
  __device__ WarpHead<kHeadDim> load(uint32_t head) const {
    WarpHead<kHeadDim> result;
    result.load(args_.step, args_.launch.rows, row_, head * kHeadDim, lane_);
    return result;
  }

  const AttentionKernelArgs& args_;
  uint32_t row_, lane_;
  Turn<kHeadDim> turn_;
};

}  // namespace nibble::cuda
