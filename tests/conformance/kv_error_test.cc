// How far attention over stored rows is from attention over exact ones, on Gaussian data and on
// data with outliers: docs/formats/kv-quality.md.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_codec.h"
#include "support/round_to_nearest.h"

namespace nibble {
namespace {

using namespace backend;

constexpr uint32_t kHeadDim = 128, kKeys = 256;
constexpr int kQueries = 200;

using Row = std::vector<float>;
using Store = std::function<void(Row&)>;  // makes of a row what is read back

Store stored_as(KvFormat format) {
  const KvRowLayout layout{.format = format,
                           .values = kHeadDim,
                           .block = format == KvFormat::kQ8    ? 32u
                                    : format == KvFormat::kTq4 ? kHeadDim
                                                               : 0u};
  return [layout](Row& row) {
    std::vector<std::byte> head(layout.head_bytes());
    encode_kv_row(layout, row, head.data(), 0);
    decode_kv_row(layout, head.data(), 0, row);
  };
}
Store nearest(size_t block) {
  return [block](Row& row) { test::round_to_nearest_4bit(row, block); };
}

double dot(const Row& a, const Row& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += double(a[i]) * b[i];
  return sum;
}
double square_distance(const Row& a, const Row& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::pow(double(a[i]) - b[i], 2);
  return sum;
}

Row attend(const Row& query, const std::vector<Row>& keys, const std::vector<Row>& values) {
  std::vector<double> sums(kHeadDim);
  double total = 0;
  for (size_t i = 0; i < keys.size(); ++i) {
    const double weight = std::exp(dot(query, keys[i]));
    total += weight;
    for (size_t d = 0; d < kHeadDim; ++d) sums[d] += weight * values[i][d];
  }
  Row output(kHeadDim);
  for (size_t d = 0; d < kHeadDim; ++d) output[d] = float(sums[d] / total);
  return output;
}

// Squares of errors, relative to the squares of what is exact.
struct Errors {
  double rows;    // of keys and values
  double output;  // of attention
};

// Scores have variance 1. With outliers, four channels are 20 times as large as the others.
Errors errors_of(const Store& store, bool outliers, unsigned seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  Row sizes(kHeadDim, 1);
  if (outliers) {
    for (const size_t channel : {5, 40, 41, 100}) sizes[channel] = 20;
  }
  const double score_size = std::sqrt(dot(sizes, sizes));
  const auto draw = [&](const Row& channel_sizes) {
    Row row(kHeadDim);
    for (size_t d = 0; d < kHeadDim; ++d) row[d] = normal(random) * channel_sizes[d];
    return row;
  };
  double row_error = 0, row_total = 0, output_error = 0, output_total = 0;
  for (int i = 0; i < kQueries; ++i) {
    std::vector<Row> keys, values, stored_keys, stored_values;
    const auto add = [&](std::vector<Row>& exact, std::vector<Row>& stored) {
      exact.push_back(draw(sizes));
      Row& row = stored.emplace_back(exact.back());
      store(row);
      row_error += square_distance(exact.back(), row);
      row_total += dot(exact.back(), exact.back());
    };
    for (uint32_t key = 0; key < kKeys; ++key) {
      add(keys, stored_keys);
      add(values, stored_values);
    }
    Row query = draw(Row(kHeadDim, 1));
    for (float& x : query) x = float(x / score_size);
    const Row exact = attend(query, keys, values);
    output_error += square_distance(attend(query, stored_keys, stored_values), exact);
    output_total += dot(exact, exact);
  }
  return {row_error / row_total, output_error / output_total};
}

// An error of relative square D in the rows, unrelated to them, changes each score of variance 1 by
// one of variance D. To first order, changed weights and changed values each move the output by D
// of its square; as scores are spread, weights move it a little less or more, within a half.
constexpr double kOutputPerRow = 2 * 1.5;
// Not unrelated: a format's steps grow with the values, and where few channels make the scores, the
// keys with the largest weights are those with the largest values.
constexpr double kOutputPerRowOfOutliers = 10;

class KvError : public testing::TestWithParam<bool> {
 protected:
  Errors measured(std::string_view name, const Store& store) const {
    const unsigned seed = std::random_device()();
    const Errors errors = errors_of(store, GetParam(), seed);
    fmt::print("{:<14} {:<8} rows {:.3g}, output {:.3g} (seed {})\n", name,
               GetParam() ? "outliers" : "Gaussian", errors.rows, errors.output, seed);
    return errors;
  }
};

INSTANTIATE_TEST_SUITE_P(, KvError, testing::Bool(),
                         [](const auto& info) { return info.param ? "Outliers" : "Gaussian"; });

TEST_P(KvError, Tq4KeepsTurboQuantsBoundWhateverTheData) {
  // Theorem 1 of arXiv 2504.19874: at most sqrt(3) pi / 2 / 4^bits. Theorem 3: nobody can do better
  // than 4^-bits.
  const double upper = std::sqrt(3) * std::numbers::pi / 2 / 256, lower = 1.0 / 256;
  const Errors tq4 = measured("tq4", stored_as(KvFormat::kTq4));
  EXPECT_LE(tq4.rows, upper);
  EXPECT_GE(tq4.rows, lower);
  EXPECT_LE(tq4.output, kOutputPerRow * upper);
  EXPECT_GE(tq4.output, lower);
  const Errors per_128 = measured("nearest per 128", nearest(128));
  EXPECT_LT(tq4.rows, per_128.rows);
  EXPECT_LT(tq4.output, per_128.output);
  const Errors per_32 = measured("nearest per 32", nearest(32));
  if (GetParam()) {
    EXPECT_LT(tq4.rows, 0.7 * per_32.rows);
    EXPECT_LT(tq4.output, 0.7 * per_32.output);
  }
}

TEST_P(KvError, Q8AndF16RoundAsTheyMust) {
  const double per_row = GetParam() ? kOutputPerRowOfOutliers : kOutputPerRow;
  const Errors q8 = measured("q8", stored_as(KvFormat::kQ8));
  // Steps of a 127th of the block's largest value, which has no more than all of its square; each
  // is off by a twelfth of a step's square.
  EXPECT_LE(q8.rows, 32.0 / (12 * 127 * 127));
  EXPECT_LE(q8.output, per_row * q8.rows);
  EXPECT_GE(q8.output, 0.2 * q8.rows);
  // At most 2^-11 of a value, and evenly spread: a third of its square.
  const Errors f16 = measured("f16", stored_as(KvFormat::kF16));
  EXPECT_LE(f16.rows, 0x1p-22 / 3);
  EXPECT_LE(f16.output, per_row * f16.rows);
}

}  // namespace
}  // namespace nibble
