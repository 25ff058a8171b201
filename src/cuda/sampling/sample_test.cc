// The device's draws against backend::sample on the same logits.

#include "cuda/sampling/sample.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "cuda/device_array.h"
#include "cuda/test_support.h"

namespace nibble::cuda {
namespace {

using backend::SampleRequest;
using backend::SamplingParams;

class Sampling : public testing::Test {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }

  std::vector<float> logits(size_t count) {
    std::normal_distribution<float> distribution(0, 4);
    std::vector<float> values(count);
    for (float& value : values) value = distribution(random_);
    return values;
  }

  // One draw for each request, request i from row i of `logits`.
  static std::vector<int32_t> draw(const std::vector<float>& logits, uint32_t vocabulary,
                                   const std::vector<SampleRequest>& requests) {
    DeviceRequests lists;
    for (uint32_t i = 0; i < requests.size(); ++i) lists.add(requests[i], i);
    const DeviceArray<float> d_logits{std::span(logits)};
    const DeviceArray<DeviceRequest> d_requests{std::span<const DeviceRequest>(lists.requests)};
    const DeviceArray<TokenBias> biases{std::span<const TokenBias>(lists.biases)};
    const DeviceArray<TokenCount> seen{std::span<const TokenCount>(lists.seen)};
    const DeviceArray<int32_t> tokens(requests.size());
    launch_sample(nullptr, {d_requests.data(), uint32_t(requests.size()), biases.data(),
                            seen.data(), d_logits.data(), vocabulary, tokens.data()});
    NIBBLE_CUDA(cudaDeviceSynchronize());
    return tokens.download();
  }

  // How many of `count` draws with these parameters differ from the host's.
  size_t differing(SamplingParams params, uint32_t vocabulary, size_t count,
                   std::span<const TokenId> recent = {}) {
    constexpr size_t kRows = 8;
    size_t differ = 0;
    for (size_t i = 0; i < count; i += kRows) {
      const std::vector<float> rows = logits(kRows * vocabulary);
      std::vector<SampleRequest> requests;
      for (size_t row = 0; row < kRows; ++row) requests.push_back({&params, i + row, recent});
      const std::vector<int32_t> tokens = draw(rows, vocabulary, requests);
      for (size_t row = 0; row < kRows; ++row) {
        const auto begin = rows.begin() + long(row * vocabulary);
        std::vector<float> copy(begin, begin + vocabulary);
        differ += backend::sample(copy, requests[row]).value != tokens[row];
      }
    }
    return differ;
  }

  const uint32_t seed_ = std::random_device{}();
  const testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
  std::mt19937 random_{seed_};
};

TEST_F(Sampling, GreedyIsTheFirstLargest) {
  SamplingParams greedy;
  greedy.temperature = 0;
  for (const uint32_t vocabulary : {1u, 31u, 2048u, 262144u})
    EXPECT_EQ(differing(greedy, vocabulary, 16), 0u) << vocabulary;

  std::vector<float> ties(5000, -1.0f);
  ties[4321] = ties[999] = ties[1001] = 2;
  EXPECT_EQ(draw(ties, 5000, {{&greedy, 0, {}}})[0], 999);
  std::vector<float> zeros(100, -1.0f);
  zeros[20] = -0.0f, zeros[30] = 0.0f;
  EXPECT_EQ(draw(zeros, 100, {{&greedy, 0, {}}})[0], 20);
  std::vector<float> broken(100, NAN);
  EXPECT_EQ(draw(broken, 100, {{&greedy, 0, {}}})[0], backend::kNoToken.value);
  broken[70] = -1e30f;
  EXPECT_EQ(draw(broken, 100, {{&greedy, 0, {}}})[0], 70);
}

// As a step of several sessions has it: each row with parameters of its own.
TEST_F(Sampling, RowsOfOneLaunchHaveTheirOwnParameters) {
  constexpr uint32_t kVocabulary = 3000;
  std::vector<SamplingParams> params(8);
  params[0].temperature = 0;
  params[2].temperature = 0.3f;
  params[3].top_k = 40;
  params[4].top_p = 0.9f;
  params[5].min_p = 0.1f;
  params[6].logit_bias = {{{7}, 3.0f}, {{1234}, 20.0f}};
  params[7].repetition_penalty = 1.3f, params[7].presence_penalty = 0.5f;
  const std::vector<TokenId> recent = {{5}, {6}, {5}, {2999}};
  std::vector<SampleRequest> requests;
  for (SamplingParams& of_row : params) {
    of_row.seed = random_();
    requests.push_back({&of_row, requests.size(), recent});
  }
  const std::vector<float> rows = logits(params.size() * kVocabulary);
  const std::vector<int32_t> tokens = draw(rows, kVocabulary, requests);
  size_t differ = 0;
  for (size_t row = 0; row < requests.size(); ++row) {
    const auto begin = rows.begin() + long(row * kVocabulary);
    std::vector<float> copy(begin, begin + kVocabulary);
    differ += backend::sample(copy, requests[row]).value != tokens[row];
  }
  EXPECT_LE(differ, 1u);  // a token on the very edge of the nucleus
}

// Many draws: slow under compute-sanitizer, which tools/sanitize_cuda.sh leaves them out of.
using SamplingStatistics = Sampling;

TEST_F(SamplingStatistics, DrawsWhatTheHostDraws) {
  std::vector<SamplingParams> all(8);
  all[0].temperature = 1;
  all[1].temperature = 0.3f;
  all[2].top_k = 64;
  all[3].top_p = 0.9f;
  all[4].top_k = 40, all[4].top_p = 0.95f, all[4].min_p = 0.02f;
  all[5].min_p = 0.1f, all[5].temperature = 2;
  all[6].top_k = 1;
  all[7].top_p = 1e-6f;
  constexpr size_t kDraws = 64;
  for (size_t i = 0; i < all.size(); ++i) {
    all[i].seed = random_();
    for (const uint32_t vocabulary : {100u, 8192u, 262144u}) {
      // A token on the very edge of a nucleus, or noise that rounds differently, is rare.
      EXPECT_LE(differing(all[i], vocabulary, kDraws), 1u) << "case " << i << ", " << vocabulary;
    }
  }
}

TEST_F(SamplingStatistics, BiasAndPenaltiesAreTheHosts) {
  SamplingParams params;
  params.temperature = 0;
  params.repetition_penalty = 1.3f;
  params.presence_penalty = 0.5f;
  params.frequency_penalty = 0.25f;
  params.penalty_window = 300;
  std::vector<TokenId> recent;
  for (int i = 0; i < 400; ++i) recent.push_back({int32_t(random_() % 200)});
  for (int i = 0; i < 100; ++i)
    params.logit_bias.push_back({{int32_t(random_() % 200)}, float(random_() % 100) / 10});
  EXPECT_EQ(differing(params, 200, 256, recent), 0u);
  params.temperature = 1;
  params.top_k = 20;
  EXPECT_LE(differing(params, 200, 256, recent), 1u);
}

TEST_F(SamplingStatistics, ForbiddenTokensAreNeverDrawn) {
  SamplingParams params;
  params.top_k = 10;
  std::vector<float> rows(1000, -INFINITY);
  rows[500] = 1, rows[600] = 1.5f;
  for (uint64_t position = 0; position < 200; ++position) {
    const int32_t token = draw(rows, 1000, {{&params, position, {}}})[0];
    EXPECT_TRUE(token == 500 || token == 600) << token;
  }
}

// Frequencies over many positions are the softmax's: chi-square with 9 degrees of freedom stays
// below 40 but for one run in a hundred thousand.
TEST_F(SamplingStatistics, FrequenciesAreTheSoftmax) {
  constexpr uint32_t kTokens = 10;
  constexpr size_t kBatches = 200, kRows = 100;
  const std::vector<float> row = {0, 0.5f, 1, 1.5f, 2, -1, 0.1f, 0.2f, 0.3f, -0.5f};
  std::vector<float> rows;
  for (size_t i = 0; i < kRows; ++i) rows.insert(rows.end(), row.begin(), row.end());
  SamplingParams params;
  params.seed = random_();
  std::vector<size_t> counts(kTokens);
  for (size_t batch = 0; batch < kBatches; ++batch) {
    std::vector<SampleRequest> requests;
    for (size_t i = 0; i < kRows; ++i) requests.push_back({&params, batch * kRows + i, {}});
    for (const int32_t token : draw(rows, kTokens, requests)) ++counts[size_t(token)];
  }
  double total = 0, chi_square = 0;
  for (const float logit : row) total += std::exp(logit);
  for (uint32_t i = 0; i < kTokens; ++i) {
    const double expected = kBatches * kRows * std::exp(row[i]) / total;
    chi_square += std::pow(double(counts[i]) - expected, 2) / expected;
  }
  EXPECT_LT(chi_square, 40);
}

}  // namespace
}  // namespace nibble::cuda
