#include "reference/steps.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <vector>

namespace nibble::reference {
namespace {

// Results are computed in double and rounded once, so they are off by half a unit in the last
// place; one unit leaves room for the doubles' own errors.
constexpr float kUlp = std::numeric_limits<float>::epsilon();

std::vector<float> random_values(std::mt19937& random, size_t count) {
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return values;
}

void expect_near(std::span<const float> actual, std::span<const double> expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_NEAR(actual[i], expected[i], kUlp * std::abs(expected[i])) << "at " << i;
  }
}

class Steps : public testing::Test {
 protected:
  const unsigned seed_ = std::random_device()();
  std::mt19937 random_{seed_};
  testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
};

TEST_F(Steps, DotTakesEveryElementOfAnyLength) {
  for (size_t length = 0; length <= 40; ++length) {
    const auto a = random_values(random_, length);
    const auto b = random_values(random_, length);
    long double expected = 0, magnitude = 0;
    for (size_t i = 0; i < length; ++i) {
      expected += (long double)a[i] * b[i];
      magnitude += std::abs((long double)a[i] * b[i]);
    }
    // Each of the sums' additions rounds once.
    const double bound = double(length) * 0x1p-53 * double(magnitude);
    EXPECT_NEAR(dot(a, b), double(expected), bound) << length;
  }
}

TEST_F(Steps, RmsNormByHand) {
  // mean square (9 + 16) / 2 + 12 = 24.5, root 7 / sqrt(2)
  const std::vector<float> input = {3, 4};
  std::vector<float> output(2);
  rms_norm({.weight = {2, -1}, .epsilon = 12}, input, output);
  const double root = 7 / std::numbers::sqrt2;
  expect_near(output, std::vector<double>{6 / root, -4 / root});
}

TEST_F(Steps, RmsNormWithoutWeightInPlaceGivesUnitMeanSquare) {
  auto values = random_values(random_, 300);
  for (float& x : values) x *= 1e4f;
  rms_norm({.weight = {}, .epsilon = 1e-6f}, values, values);
  double mean_square = 0;
  for (float x : values) mean_square += double{x} * x / 300;
  EXPECT_NEAR(mean_square, 1, 2 * kUlp);
}

TEST_F(Steps, RmsNormOfZerosIsZero) {
  std::vector<float> values(8, 0.0f);
  rms_norm({.weight = {}, .epsilon = 1e-6f}, values, values);
  EXPECT_EQ(values, std::vector<float>(8, 0.0f));
}

TEST_F(Steps, RotateTurnsHalvesAgainstEachOtherAndLeavesFrequencyZeroAlone) {
  std::vector<float> head = {1, 2, 3, 4, 5, 6};
  const backend::Rope rope{{0.5f, 0.0f, 0.25f}};
  rotate(rope, 3, head);
  const auto turned = [](double low, double high, double angle) {
    return std::pair(low * std::cos(angle) - high * std::sin(angle),
                     high * std::cos(angle) + low * std::sin(angle));
  };
  const auto [a0, a3] = turned(1, 4, 1.5);
  const auto [a2, a5] = turned(3, 6, 0.75);
  expect_near(head, std::vector<double>{a0, 2, a2, a3, 5, a5});
}

TEST_F(Steps, RotatedScoresDependOnDistanceOnly) {
  const auto query = random_values(random_, 64);
  const auto key = random_values(random_, 64);
  backend::Rope rope;
  for (int d = 0; d < 32; ++d) rope.inverse_frequencies.push_back(std::pow(1e4f, -d / 32.0f));
  const auto score = [&](uint32_t query_position, uint32_t key_position) {
    auto q = query, k = key;
    rotate(rope, query_position, q);
    rotate(rope, key_position, k);
    return dot(q, k);
  };
  // The angles are floats: at position 1000 they are off by up to 1000 * 2^-24.
  const double bound = 4 * 1000 * 0x1p-24 * std::sqrt(dot(query, query) * dot(key, key));
  EXPECT_NEAR(score(7, 0), score(1000, 993), bound);
}

TEST_F(Steps, AttendEqualsSoftmaxWrittenOut) {
  constexpr size_t kHeadDim = 20, kPositions = 33;
  const auto query = random_values(random_, kHeadDim);
  const auto keys = random_values(random_, kPositions * kHeadDim);
  const auto values = random_values(random_, kPositions * kHeadDim);
  std::vector<double> expected(kHeadDim, 0.0);
  double total = 0, magnitude = 0;
  for (size_t p = 0; p < kPositions; ++p) {
    double score = 0;
    for (size_t d = 0; d < kHeadDim; ++d) score += double{query[d]} * keys[p * kHeadDim + d];
    const double weight = std::exp(0.25 * score);
    total += weight;
    for (size_t d = 0; d < kHeadDim; ++d) {
      expected[d] += weight * values[p * kHeadDim + d];
      magnitude = std::max(magnitude, std::abs(double{values[p * kHeadDim + d]}));
    }
  }
  std::vector<float> output(kHeadDim);
  attend(query, keys, values, 0.25f, output);
  for (size_t d = 0; d < kHeadDim; ++d) {
    EXPECT_NEAR(output[d], expected[d] / total, kUlp * magnitude);
  }
}

TEST_F(Steps, AttendToOneKeyIsItsValueEvenWhereScoresOverflowExp) {
  const std::vector<float> query = {1e4f, 1e4f};
  const std::vector<float> keys = {1e4f, 1e4f, -1e4f, 0};
  const std::vector<float> values = {1.25f, -3, 7, 8};
  std::vector<float> output(2);
  attend(query, keys, values, 1.0f, output);
  EXPECT_EQ(output, (std::vector<float>{1.25f, -3}));
  attend(query, std::span(keys).last(2), std::span(values).last(2), 1.0f, output);
  EXPECT_EQ(output, (std::vector<float>{7, 8}));
}

TEST_F(Steps, GeluTanhByTable) {
  EXPECT_EQ(gelu_tanh(0), 0);
  // torch.nn.functional.gelu(x, approximate="tanh") in double
  EXPECT_NEAR(gelu_tanh(1), 0.8411919906082768, kUlp);
  EXPECT_NEAR(gelu_tanh(-1), -0.15880800939172324, kUlp);
  EXPECT_EQ(gelu_tanh(50), 50);
  EXPECT_EQ(gelu_tanh(-50), 0);
}

TEST_F(Steps, SoftcapBoundsAndZeroMeansNone) {
  EXPECT_NEAR(softcap(30, 30), 30 * std::tanh(1.0), 30 * kUlp);
  EXPECT_EQ(softcap(1e30f, 30), 30);
  EXPECT_EQ(softcap(-1e30f, 30), -30);
  EXPECT_EQ(softcap(123.5f, 0), 123.5f);
}

}  // namespace
}  // namespace nibble::reference
