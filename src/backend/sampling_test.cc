#include "backend/sampling.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "base/error.h"

namespace nibble::backend {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

int32_t draw(std::vector<float> logits, const SamplingParams& params, uint64_t position = 0,
             const std::vector<TokenId>& recent = {}) {
  return sample(logits, {&params, position, recent}).value;
}

// What sample() must choose from, computed plainly: sorted, cut, renormalised.
std::vector<double> expected_distribution(const std::vector<float>& logits,
                                          const SamplingParams& params) {
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  if (params.top_k != 0 && params.top_k < order.size()) order.resize(params.top_k);
  std::vector<double> weights;
  for (size_t i : order) {
    weights.push_back(std::exp((double{logits[i]} - logits[order[0]]) / params.temperature));
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double sum = 0;
  size_t kept = 0;
  while (kept < weights.size() && (kept == 0 || sum < params.top_p * total)) sum += weights[kept++];
  while (kept > 1 && weights[kept - 1] < params.min_p) sum -= weights[--kept];
  std::vector<double> probabilities(logits.size());
  for (size_t i = 0; i < kept; ++i) probabilities[order[i]] = weights[i] / sum;
  return probabilities;
}

// Pearson's chi-square of the draws against the expected distribution stays below
// d + 2 sqrt(d x) + 2 x, which chance exceeds with probability e^-x (Laurent and Massart 2000,
// lemma 1; d degrees of freedom, x = 18: once in 65 million); tokens that were cut never appear.
void expect_distribution(const std::vector<float>& logits, SamplingParams params) {
  params.seed = std::random_device{}();
  SCOPED_TRACE(params.seed);
  constexpr int kDraws = 20'000;
  std::vector<int> counts(logits.size());
  for (int i = 0; i < kDraws; ++i) ++counts[static_cast<size_t>(draw(logits, params, i))];
  const std::vector<double> expected = expected_distribution(logits, params);
  double chi_square = 0;
  int cells = 0;
  double rare = 0, rare_count = 0;  // fewer than 5 expected each: one cell together
  for (size_t i = 0; i < logits.size(); ++i) {
    const double mean = expected[i] * kDraws;
    if (mean == 0) {
      EXPECT_EQ(counts[i], 0) << "token " << i << " was cut";
    } else if (mean < 5) {
      rare += mean;
      rare_count += counts[i];
    } else {
      chi_square += (counts[i] - mean) * (counts[i] - mean) / mean;
      ++cells;
    }
  }
  if (rare >= 5) {
    chi_square += (rare_count - rare) * (rare_count - rare) / rare;
    ++cells;
  }
  const double degrees = cells - 1;
  EXPECT_LT(chi_square, degrees + 2 * std::sqrt(degrees * 18) + 2 * 18);
}

std::vector<float> random_logits(size_t vocabulary, double spread) {
  std::mt19937_64 random(std::random_device{}());
  std::normal_distribution<float> normal(0, static_cast<float>(spread));
  std::vector<float> logits(vocabulary);
  for (float& logit : logits) logit = normal(random);
  return logits;
}

TEST(Sampling, TemperatureAloneFollowsTheSoftmax) {
  expect_distribution(random_logits(50, 2), {});
  expect_distribution(random_logits(50, 2), {.temperature = 0.5f});
  expect_distribution(random_logits(50, 2), {.temperature = 3.0f});
  expect_distribution({0, 0, 0, 0}, {});
}

TEST(Sampling, EachFilterAloneAndAllTogether) {
  for (int round = 0; round < 3; ++round) {
    const std::vector<float> logits = random_logits(60, 2);
    expect_distribution(logits, {.top_k = 5});
    expect_distribution(logits, {.top_k = 60});
    expect_distribution(logits, {.top_k = 1000});
    expect_distribution(logits, {.top_p = 0.3f});
    expect_distribution(logits, {.top_p = 0.9f});
    expect_distribution(logits, {.min_p = 0.1f});
    expect_distribution(logits, {.temperature = 1.5f, .top_k = 20, .top_p = 0.8f, .min_p = 0.05f});
  }
}

TEST(Sampling, CutsInALargeVocabularyAreExact) {
  std::vector<float> logits = random_logits(100'000, 1);
  std::vector<float> sorted = logits;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  for (const uint32_t k : {1u, 2u, 64u, 5000u}) {
    for (uint64_t position = 0; position < 20; ++position) {
      const int32_t token = draw(logits, {.temperature = 100.0f, .top_k = k}, position);
      EXPECT_GE(logits[static_cast<size_t>(token)], sorted[k - 1]);
    }
  }
  const SamplingParams nucleus{.temperature = 1.0f, .top_p = 0.2f};
  const std::vector<double> expected = expected_distribution(logits, nucleus);
  for (uint64_t position = 0; position < 50; ++position) {
    EXPECT_GT(expected[static_cast<size_t>(draw(logits, nucleus, position))], 0);
  }
}

TEST(Sampling, TiesAtTheCutGoToTheSmallerId) {
  const std::vector<float> logits = {1, 5, 3, 3, 3, 3, 0};
  std::vector<int> counts(logits.size());
  for (uint64_t position = 0; position < 500; ++position) {
    ++counts[static_cast<size_t>(draw(logits, {.temperature = 10, .top_k = 3}, position))];
  }
  EXPECT_GT(counts[1], 0);
  EXPECT_GT(counts[2], 0);
  EXPECT_GT(counts[3], 0);
  EXPECT_EQ(counts[1] + counts[2] + counts[3], 500);
}

TEST(Sampling, GreedyTakesTheFirstLargest) {
  EXPECT_EQ(draw({1, 7, 3, 7}, {.temperature = 0}), 1);
  EXPECT_EQ(draw({-1, -7}, {.temperature = 0}), 0);
}

TEST(Sampling, TinyTemperatureAndTinyTopPAreGreedy) {
  const std::vector<float> logits = random_logits(1000, 5);
  const int32_t best = draw(logits, {.temperature = 0});
  EXPECT_EQ(draw(logits, {.temperature = std::numeric_limits<float>::denorm_min()}), best);
  EXPECT_EQ(draw(logits, {.temperature = 5, .top_p = 1e-30f}), best);
  EXPECT_EQ(draw(logits, {.temperature = 5, .top_k = 1}), best);
}

TEST(Sampling, EqualRequestsGiveEqualTokensAndOthersDiffer) {
  const std::vector<float> logits(1000, 0.0f);
  int same_position = 0, same_seed = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    const SamplingParams params{.top_p = 0.9f, .seed = i};
    EXPECT_EQ(draw(logits, params, i), draw(logits, params, i));
    same_position += draw(logits, {.seed = i}, 0) == draw(logits, {.seed = i + 1}, 0);
    same_seed += draw(logits, {.seed = 0}, i) == draw(logits, {.seed = 0}, i + 1);
  }
  EXPECT_LT(same_position, 5);  // a thousand equals: 0.1 expected
  EXPECT_LT(same_seed, 5);
}

TEST(Sampling, InfinitePenaltiesOfInfiniteLogitsAreSurvived) {
  constexpr float kMost = std::numeric_limits<float>::max();
  for (const float temperature : {0.0f, 1.0f}) {
    const SamplingParams params{
        .temperature = temperature, .presence_penalty = kMost, .frequency_penalty = kMost};
    EXPECT_EQ(draw({kInfinity, 1, -1e6f}, params, 0, {{0}, {0}}), 1);  // infinity - infinity
  }
}

TEST(Sampling, NanAndInfiniteLogitsAreSurvived) {
  for (const SamplingParams& params :
       {SamplingParams{}, {.temperature = 0}, {.top_k = 2}, {.top_p = 0.5f}, {.min_p = 0.5f}}) {
    for (uint64_t position = 0; position < 50; ++position) {
      EXPECT_EQ(draw({kNan, -kInfinity, 1, kNan}, params, position), 2);
      EXPECT_EQ(draw({1, kInfinity, 2}, params, position), 1);
      EXPECT_EQ(draw({-kInfinity, -kInfinity}, params, position), kNoToken.value);
      EXPECT_EQ(draw({kNan, kNan, kNan}, params, position), kNoToken.value);
      EXPECT_EQ(draw({5}, params, position), 0);
      const int32_t either = draw({kInfinity, 0, kInfinity}, params, position);
      EXPECT_TRUE(either == 0 || either == 2);
    }
  }
}

TEST(Sampling, BiasComesBeforeAllElse) {
  EXPECT_EQ(draw({5, 0, 0}, {.temperature = 0, .logit_bias = {{{2}, 6.0f}}}), 2);
  EXPECT_EQ(draw({5, 4, 0}, {.temperature = 0, .logit_bias = {{{0}, -100.0f}}}), 1);
  EXPECT_EQ(draw({5, 0, 0}, {.top_k = 1, .logit_bias = {{{1}, 3.0f}, {{1}, 3.0f}}}), 1);
}

TEST(Sampling, PenaltiesSeeTheLastTokens) {
  const std::vector<TokenId> recent = {{0}, {0}, {1}};
  // Repetition divides what is likely and multiplies what is not.
  EXPECT_EQ(draw({4, 1, 3}, {.temperature = 0, .repetition_penalty = 1.5f}, 0, recent), 2);
  EXPECT_EQ(draw({-4, -3, -4}, {.temperature = 0, .repetition_penalty = 1.5f}, 0, recent), 2);
  // Presence counts a token once, frequency each time.
  EXPECT_EQ(draw({4, 3.5f, 0}, {.temperature = 0, .presence_penalty = 1}, 0, recent), 0);
  EXPECT_EQ(draw({4, 3.5f, 0}, {.temperature = 0, .frequency_penalty = 1}, 0, recent), 1);
  // Only the window counts.
  SamplingParams narrow{.temperature = 0, .frequency_penalty = 10, .penalty_window = 1};
  EXPECT_EQ(draw({4, 3.5f, 0}, narrow, 0, recent), 0);
  narrow.penalty_window = 0;
  EXPECT_EQ(draw({0, 3.5f, 0}, narrow, 0, recent), 1);
}

TEST(Gumbel, NoiseHasItsMeanAndVariance) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  constexpr int kCount = 100'000;
  double sum = 0, squares = 0;
  for (int i = 0; i < kCount; ++i) {
    const double noise = gumbel_noise(seed, static_cast<uint64_t>(i / 100), {i % 100});
    ASSERT_TRUE(std::isfinite(noise));
    sum += noise;
    squares += noise * noise;
  }
  const double mean = sum / kCount;
  const double variance = squares / kCount - mean * mean;
  const double expected_variance = M_PI * M_PI / 6;
  // Six standard errors; Gumbel's kurtosis is 5.4.
  EXPECT_NEAR(mean, 0.5772156649, 6 * std::sqrt(expected_variance / kCount));
  EXPECT_NEAR(variance, expected_variance, 6 * expected_variance * std::sqrt(4.4 / kCount));
}

TEST(SamplingParams, ValidateNamesTheParameterAndItsRange) {
  const auto message = [](const SamplingParams& params) -> std::string {
    try {
      params.validate(10);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(message({}), "");
  EXPECT_EQ(message({.temperature = 0, .top_k = 4'000'000'000u, .top_p = 1, .min_p = 0.99f}), "");
  for (const float bad : {-0.1f, kNan, kInfinity}) {
    EXPECT_EQ(message({.temperature = bad}).find("temperature is"), 0u);
    EXPECT_EQ(message({.top_p = bad}).find("top_p is"), 0u);
    EXPECT_EQ(message({.min_p = bad}).find("min_p is"), 0u);
    EXPECT_EQ(message({.repetition_penalty = bad}).find("repetition_penalty is"), 0u);
  }
  for (const float bad : {-kInfinity, kNan, kInfinity}) {
    EXPECT_EQ(message({.presence_penalty = bad}).find("presence_penalty is"), 0u);
    EXPECT_EQ(message({.frequency_penalty = bad}).find("frequency_penalty is"), 0u);
    EXPECT_EQ(message({.logit_bias = {{{1}, bad}}}).find("logit_bias is"), 0u);
  }
  EXPECT_EQ(message({.top_p = 0}), "top_p is 0, expected a number in (0, 1]");
  EXPECT_EQ(message({.min_p = 1}), "min_p is 1, expected a number in [0, 1)");
  EXPECT_NE(message({.repetition_penalty = 0}), "");
  EXPECT_EQ(message({.logit_bias = {{{10}, 1.0f}}}),
            "logit_bias names token 10, but the vocabulary has tokens 0 to 9");
  EXPECT_NE(message({.logit_bias = {{{-1}, 1.0f}}}), "");
}

}  // namespace
}  // namespace nibble::backend
