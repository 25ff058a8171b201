#pragma once
// How the next token is chosen, as a pure function that every backend computes alike.

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "base/id.h"

namespace nibble::backend {

struct SamplingParams {
  float temperature = 1.0f;         // 0: greedy
  uint32_t top_k = 0;               // 0: off
  float top_p = 1.0f;               // in (0, 1]; 1: off
  float min_p = 0.0f;               // in [0, 1); 0: off
  float repetition_penalty = 1.0f;  // > 0; 1: off
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  uint32_t penalty_window = 64;  // how many of the last tokens the penalties see
  std::vector<std::pair<TokenId, float>> logit_bias = {};
  uint64_t seed = 0;

  // Throws Error(kInvalidArgument) naming the first parameter that is NaN, infinite or out of its
  // range, with the range.
  void validate(uint32_t vocabulary) const;
};

// Instead of a token where there is none to choose.
inline constexpr TokenId kNoToken{-1};

// One draw. Equal requests on equal logits give equal tokens: randomness is a hash of seed,
// position and token, not a stream.
struct SampleRequest {
  const SamplingParams* params;
  uint64_t position;                // of the token to be drawn
  std::span<const TokenId> recent;  // the last tokens, for the penalties; at most penalty_window
};

// Order: logit bias; penalties; greedy stops here with the first largest logit. Then temperature,
// top-k, top-p (smallest set of probability >= p, at least one token), min-p (relative to the most
// likely), and a Gumbel-max draw among what is left. NaN logits count as minus infinity; where
// nothing is above that, the result is kNoToken. `logits` is [vocabulary] and is changed.
TokenId sample(std::span<float> logits, const SampleRequest& request);

// Standard Gumbel noise for (seed, position, token): -log(-log(u)), u in (0, 1) from a 64-bit mix.
float gumbel_noise(uint64_t seed, uint64_t position, TokenId token);

}  // namespace nibble::backend
