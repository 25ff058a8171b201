// One cluster of blocks draws one row's token (one block where there are no clusters). Every pass
// reads the row's logits again: a block's share lies in its L1 cache. What a top-k or a nucleus
// keeps is a prefix of the tokens in order of likelihood, so both are found as a threshold, by a
// descent over the digits of a 64-bit key that orders all tokens; counts and weights are integers,
// whose sums depend on no order.

#include <limits>

#include "cuda/elementwise/row.cuh"
#include "cuda/runtime.h"
#include "cuda/sampling/sample.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kThreads = 1024;
constexpr uint32_t kDigitBits = 8;
constexpr uint32_t kDigits = 1 << kDigitBits;
constexpr int kKeyBits = 64;

// Likelier tokens have larger keys; of equals the earlier token.
__device__ __forceinline__ uint64_t key_of(float logit, uint32_t token) {
  const uint32_t bits = __float_as_uint(logit == 0 ? 0.0f : logit);  // -0 equals 0
  const uint32_t ordered = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return uint64_t(ordered) << 32 | uint32_t(~token);
}
__device__ __forceinline__ uint32_t token_of(uint64_t key) {
  return ~uint32_t(key);
}

// e^logit as a multiple of 2^-40: 2^23 tokens fit a sum.
__device__ __forceinline__ uint64_t weight_of(float logit) {
  return uint64_t(exp(double(logit)) * 0x1p40);
}

__device__ __forceinline__ uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}
// backend::gumbel_noise
__device__ __forceinline__ float gumbel_noise(uint64_t seed, uint64_t position, uint32_t token) {
  const uint64_t bits = mix(mix(mix(seed) ^ position) ^ token);
  const double u = (double(bits >> 12) + 0.5) * 0x1p-52;
  return float(-log(-log(u)));
}
// Noise lies in [-3.7, 36.8], so no token that is this much less likely than the first can win.
constexpr float kHopeless = -41;

struct SampleShared {
  uint64_t largest;  // of the block
  uint64_t warp_values[kMostWarps];
  unsigned long long histogram[kDigits];  // of the block
  uint64_t total[kDigits];                // of the cluster
  uint64_t prefix;                        // of the threshold
  uint64_t needed;
  bool found;
};

// What all threads of the cluster share.
class Sampler {
 public:
  __device__ Sampler(const SampleArgs& args, const DeviceRequest& request, SampleShared& shared)
      : request_(request),
        shared_(shared),
        logits_(args.logits + uint64_t(request.logits_row) * args.vocabulary),
        vocabulary_(args.vocabulary) {}

  // Logit bias and penalties; returns when all blocks see them.
  __device__ void adjust(const TokenBias* biases, const TokenCount* seen) {
    if (place_.rank == 0) {
      biases += request_.first_bias;
      for (uint32_t i = threadIdx.x; i < request_.biases; i += kThreads) {
        const int32_t token = biases[i].token;
        if (i > 0 && biases[i - 1].token == token) continue;
        float logit = clean(logits_[token]);
        for (uint32_t j = i; j < request_.biases && biases[j].token == token; ++j)
          logit += biases[j].bias;
        logits_[token] = logit;
      }
      __syncthreads();
      seen += request_.first_seen;
      for (uint32_t i = threadIdx.x; i < request_.seen; i += kThreads) {
        float logit = clean(logits_[seen[i].token]);
        // Products that no compiler fuses: the same floats as on the host.
        logit = logit > 0 ? logit / request_.repetition_penalty
                          : __fmul_rn(logit, request_.repetition_penalty);
        logit -= __fadd_rn(request_.presence_penalty,
                           __fmul_rn(request_.frequency_penalty, float(seen[i].count)));
        logits_[seen[i].token] = logit;
      }
    }
    __threadfence();
    cluster_sync(place_);
  }

  // The token with the largest key among those that have one (0: none).
  template <class Key>
  __device__ uint64_t largest_key(const Key& key) {
    uint64_t own = 0;
    for_each_token([&](float logit, uint32_t token) { own = max(own, key(logit, token)); });
    for (uint32_t distance = kLanes / 2; distance > 0; distance /= 2)
      own = max(own, __shfl_xor_sync(~0u, own, distance));
    if (threadIdx.x % kLanes == 0) shared_.warp_values[threadIdx.x / kLanes] = own;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (uint32_t i = 1; i < kThreads / kLanes; ++i) own = max(own, shared_.warp_values[i]);
      shared_.largest = own;
    }
    cluster_sync(place_);
    uint64_t largest = 0;
    for (uint32_t rank = 0; rank < place_.blocks; ++rank)
      largest = max(largest, *cluster_shared(place_, &shared_.largest, rank));
    cluster_sync(place_);
    return largest;
  }

  // The least key that the smallest set of likeliest tokens with a total measure of `needed` or
  // more holds; 0 when all together have less. Counts keys from `least` on.
  template <class Measure>
  __device__ uint64_t threshold(uint64_t least, uint64_t needed, const Measure& measure) {
    uint64_t prefix = 0;
    for (int shift = kKeyBits - kDigitBits; shift >= 0; shift -= kDigitBits) {
      histogram(least, prefix, shift, measure);
      // From the likeliest digit down to the one in which `needed` is reached.
      if (threadIdx.x == 0) {
        int digit = kDigits - 1;
        while (digit >= 0 && shared_.total[digit] < needed) needed -= shared_.total[digit--];
        shared_.found = digit >= 0;
        shared_.prefix = prefix | uint64_t(max(digit, 0)) << shift;
        shared_.needed = needed;
      }
      __syncthreads();
      if (!shared_.found) return 0;
      prefix = shared_.prefix;
      needed = shared_.needed;
    }
    return prefix;
  }

  // Sum of a measure over the keys from `least` on.
  template <class Measure>
  __device__ uint64_t total(uint64_t least, const Measure& measure) {
    // A shift of 56 keeps every key: the digits' sums together are the whole.
    histogram(least, 0, kKeyBits - kDigitBits, measure);
    uint64_t sum = 0;
    for (uint32_t digit = 0; digit < kDigits; ++digit) sum += shared_.total[digit];
    __syncthreads();
    return sum;
  }

  // logit as seen by the draw: the largest is 0.
  __device__ float scaled(float logit, float largest) const {
    return logit == largest ? 0.0f : (logit - largest) / request_.temperature;
  }

 private:
  __device__ static float clean(float logit) {
    return isnan(logit) ? -std::numeric_limits<float>::infinity() : logit;
  }

  template <class Body>
  __device__ void for_each_token(const Body& body) {
    const uint32_t stride = place_.blocks * kThreads;
    for (uint32_t token = place_.rank * kThreads + threadIdx.x; token < vocabulary_;
         token += stride)
      body(clean(logits_[token]), token);
  }

  // total[d] = measure of the keys from `least` on whose bits above the digit are the prefix's.
  template <class Measure>
  __device__ void histogram(uint64_t least, uint64_t prefix, int shift, const Measure& measure) {
    for (uint32_t i = threadIdx.x; i < kDigits; i += kThreads) shared_.histogram[i] = 0;
    __syncthreads();
    const int above = shift + int(kDigitBits);
    for_each_token([&](float logit, uint32_t token) {
      const uint64_t key = key_of(logit, token);
      if (key < least) return;
      if (above < kKeyBits && (key ^ prefix) >> above != 0) return;
      if (const uint64_t amount = measure(logit))
        atomicAdd(&shared_.histogram[key >> shift & (kDigits - 1)], amount);
    });
    cluster_sync(place_);
    for (uint32_t i = threadIdx.x; i < kDigits; i += kThreads) {
      uint64_t sum = 0;
      for (uint32_t rank = 0; rank < place_.blocks; ++rank)
        sum += *cluster_shared(place_, &shared_.histogram[i], rank);
      shared_.total[i] = sum;
    }
    cluster_sync(place_);
  }

  const ClusterPlace place_;
  const DeviceRequest& request_;
  SampleShared& shared_;
  float* const logits_;
  const uint32_t vocabulary_;
};

__device__ __forceinline__ float logit_of_key(uint64_t key) {
  const uint32_t ordered = uint32_t(key >> 32);
  return __uint_as_float(ordered & 0x80000000 ? ordered & 0x7fffffff : ~ordered);
}

__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ SampleArgs args) {
  __shared__ SampleShared shared;
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  const ClusterPlace place;
  const uint32_t index = blockIdx.x / place.blocks;
  const DeviceRequest& request = args.requests[index];
  Sampler sampler(args, request, shared);
  sampler.adjust(args.biases, args.seen);

  uint64_t chosen = sampler.largest_key(key_of);
  const float largest = logit_of_key(chosen);
  const bool none = largest == -std::numeric_limits<float>::infinity();
  if (request.temperature != 0 && !none) {
    const bool limit_k = request.top_k != 0 && request.top_k < args.vocabulary;
    uint64_t least = 0;  // keys from here on take part
    if (limit_k) least = sampler.threshold(0, request.top_k, [](float) { return uint64_t{1}; });
    if (request.top_p < 1) {
      const auto weight = [&](float logit) { return weight_of(sampler.scaled(logit, largest)); };
      const uint64_t total = sampler.total(least, weight);
      const uint64_t needed =
          max(uint64_t{1}, uint64_t(ceil(double(request.top_p) * double(total))));
      least = max(least, sampler.threshold(least, needed, weight));
    }
    chosen = sampler.largest_key([&](float logit, uint32_t token) -> uint64_t {
      if (key_of(logit, token) < least) return 0;
      const float scaled = sampler.scaled(logit, largest);
      if (scaled < request.least || scaled < kHopeless) return 0;
      return key_of(scaled + gumbel_noise(request.seed, request.position, token), token);
    });
  }
  if (place.rank == 0 && threadIdx.x == 0)
    args.tokens[index] = none ? backend::kNoToken.value : int32_t(token_of(chosen));
}

}  // namespace

void launch_sample(cudaStream_t stream, const SampleArgs& args) {
  launch_dependent_clusters(stream, sample_kernel, args.count, has_clusters() ? kMostBlocks : 1,
                            kThreads, 0, args);
}

}  // namespace nibble::cuda
