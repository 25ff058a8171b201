#include "backend/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/error.h"

namespace nibble::backend {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
// Above the largest value that gumbel_noise() returns: 53 * log(2).
constexpr float kGumbelBound = 37.0f;

struct Candidate {
  float logit;
  TokenId token;
};

// Likeliest first; among equals the smaller id, so that every choice is unique.
bool likelier(const Candidate& a, const Candidate& b) {
  return a.logit != b.logit ? a.logit > b.logit : a.token < b.token;
}

TokenId first_largest(std::span<const float> logits) {
  const auto largest = std::max_element(logits.begin(), logits.end());
  return {static_cast<int32_t>(largest - logits.begin())};
}

void penalize(std::span<float> logits, const SampleRequest& request) {
  const SamplingParams& params = *request.params;
  const bool off = params.repetition_penalty == 1.0f && params.presence_penalty == 0.0f &&
                   params.frequency_penalty == 0.0f;
  if (off) return;
  const size_t seen = std::min<size_t>(request.recent.size(), params.penalty_window);
  std::vector<TokenId> recent(request.recent.end() - static_cast<ptrdiff_t>(seen),
                              request.recent.end());
  std::sort(recent.begin(), recent.end());
  for (auto begin = recent.begin(); begin != recent.end();) {
    const auto end = std::upper_bound(begin, recent.end(), *begin);
    float& logit = logits[static_cast<size_t>(begin->value)];
    // Away from zero on the unlikely side, whatever the sign.
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(end - begin);
    begin = end;
  }
}

// Makes the largest logit 0 and divides by the temperature, in this order: no temperature, however
// small, can then overflow what matters.
void scale(std::span<float> logits, float largest, float temperature) {
  for (float& logit : logits) logit = logit == largest ? 0.0f : (logit - largest) / temperature;
}

// The `k` likeliest tokens, unordered, in time linear in the vocabulary: candidates are gathered
// in a buffer of 2 k that is halved when full.
std::vector<Candidate> largest_k(std::span<const float> logits, size_t k) {
  std::vector<Candidate> kept;
  kept.reserve(std::min(2 * k, logits.size()));
  const auto halve = [&] {
    std::nth_element(kept.begin(), kept.begin() + static_cast<ptrdiff_t>(k) - 1, kept.end(),
                     likelier);
    kept.resize(k);
  };
  float threshold = kMinusInfinity;
  for (size_t i = 0; i < logits.size(); ++i) {
    // Of equals the earlier ones stay, so only larger ones can enter.
    if (logits[i] <= threshold) continue;
    kept.push_back({logits[i], {static_cast<int32_t>(i)}});
    if (kept.size() == 2 * k) {
      halve();
      threshold = kept[k - 1].logit;
    }
  }
  if (kept.size() > k) halve();
  return kept;
}

double weight(std::span<const float> logits) {
  double sum = 0;
  for (float logit : logits) sum += std::exp(double{logit});
  return sum;
}

double weight(std::span<const Candidate> candidates) {
  double sum = 0;
  for (const Candidate& candidate : candidates) sum += std::exp(double{candidate.logit});
  return sum;
}

// All tokens but those so unlikely that the others make up `top_p` of `total` without them.
std::vector<Candidate> plausible(std::span<const float> logits, double total, double top_p) {
  const double least = std::log((1.0 - top_p) * total / static_cast<double>(logits.size()));
  std::vector<Candidate> kept;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] >= least) kept.push_back({logits[i], {static_cast<int32_t>(i)}});
  }
  return kept;
}

// Keeps the fewest, likeliest candidates that weigh at least `needed`: quickselect by weight.
void keep_nucleus(std::vector<Candidate>& candidates, double needed) {
  size_t begin = 0;  // all before it are kept
  size_t end = candidates.size();
  while (end - begin > 1) {
    const size_t middle = begin + (end - begin) / 2;
    const auto at = [&](size_t i) { return candidates.begin() + static_cast<ptrdiff_t>(i); };
    std::nth_element(at(begin), at(middle), at(end), likelier);
    const double half = weight(std::span(candidates).subspan(begin, middle - begin));
    if (half >= needed) {
      end = middle;
    } else {
      needed -= half;
      begin = middle;
    }
  }
  candidates.resize(end);
}

// The Gumbel-max draw, fed one candidate at a time in any order.
class Draw {
 public:
  Draw(uint64_t seed, uint64_t position) : seed_(seed), position_(position) {}

  void consider(float logit, TokenId token) {
    if (logit + kGumbelBound < best_.logit) return;
    const Candidate noisy{logit + gumbel_noise(seed_, position_, token), token};
    if (likelier(noisy, best_)) best_ = noisy;
  }
  TokenId token() const { return best_.token; }

 private:
  uint64_t seed_, position_;
  Candidate best_{kMinusInfinity, {std::numeric_limits<int32_t>::max()}};
};

// The finaliser of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators,
// 2014), with its increment.
uint64_t mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

void check_range(const char* name, float value, bool in_range, const char* range) {
  if (std::isfinite(value) && in_range) return;
  fail(ErrorCode::kInvalidArgument, "{} is {}, expected {}", name, value, range);
}

}  // namespace

void SamplingParams::validate(uint32_t vocabulary) const {
  check_range("temperature", temperature, temperature >= 0, "a number from 0 (greedy) up");
  check_range("top_p", top_p, top_p > 0 && top_p <= 1, "a number in (0, 1]");
  check_range("min_p", min_p, min_p >= 0 && min_p < 1, "a number in [0, 1)");
  check_range("repetition_penalty", repetition_penalty, repetition_penalty > 0, "a number above 0");
  check_range("presence_penalty", presence_penalty, true, "a finite number");
  check_range("frequency_penalty", frequency_penalty, true, "a finite number");
  for (const auto& [token, bias] : logit_bias) {
    if (token.value < 0 || static_cast<uint32_t>(token.value) >= vocabulary) {
      fail(ErrorCode::kInvalidArgument,
           "logit_bias names token {}, but the vocabulary has tokens 0 to {}", token.value,
           int64_t{vocabulary} - 1);
    }
    check_range("logit_bias", bias, true, "a finite number");
  }
}

TokenId sample(std::span<float> logits, const SampleRequest& request) {
  const SamplingParams& params = *request.params;
  for (const auto& [token, bias] : params.logit_bias) {
    logits[static_cast<size_t>(token.value)] += bias;
  }
  penalize(logits, request);
  // Only now: of infinities, penalties make new ones.
  for (float& logit : logits) {
    if (std::isnan(logit)) logit = kMinusInfinity;
  }
  const TokenId greedy = first_largest(logits);
  const float largest = logits[static_cast<size_t>(greedy.value)];
  if (largest == kMinusInfinity) return kNoToken;
  if (params.temperature == 0) return greedy;
  scale(logits, largest, params.temperature);

  const bool limit_k = params.top_k != 0 && params.top_k < logits.size();
  const bool limit_p = params.top_p < 1.0f;
  const float least = params.min_p > 0 ? std::log(params.min_p) : kMinusInfinity;
  Draw draw(params.seed, request.position);
  if (!limit_k && !limit_p) {
    for (size_t i = 0; i < logits.size(); ++i) {
      if (logits[i] >= least) draw.consider(logits[i], {static_cast<int32_t>(i)});
    }
    return draw.token();
  }
  std::vector<Candidate> candidates;
  double total;
  if (limit_k) {
    candidates = largest_k(logits, params.top_k);
    total = weight(candidates);
  } else {
    total = weight(logits);
    candidates = plausible(logits, total, params.top_p);
  }
  if (limit_p) keep_nucleus(candidates, params.top_p * total);
  for (const Candidate& candidate : candidates) {
    if (candidate.logit >= least) draw.consider(candidate.logit, candidate.token);
  }
  return draw.token();
}

float gumbel_noise(uint64_t seed, uint64_t position, TokenId token) {
  const uint64_t bits = mix(mix(mix(seed) ^ position) ^ static_cast<uint32_t>(token.value));
  // 52 bits and a half: neither 0 nor 1, and exact.
  const double u = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
  return static_cast<float>(-std::log(-std::log(u)));
}

}  // namespace nibble::backend
