#include "reference/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "support/fixtures.h"

namespace nibble::reference {
namespace {

// Rows of real blocks, and the values that they stand for.
struct Blocks {
  explicit Blocks(const std::string& type)
      : bytes(test::read_file(test::fixture("quant/" + type + ".blocks"))),
        values(test::read_f32(test::fixture("quant/" + type + ".f32"))) {}

  backend::WeightSegment segment(quant::QuantType type, uint32_t rows) const {
    const std::span data(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size());
    return {"test", type, rows, data.first(rows * quant::row_bytes(type, 256))};
  }

  std::string bytes;
  std::vector<float> values;
};

// A fused weight of odd segments, each of its own type, times any number of tokens.
TEST(Linear, WalksTheSegmentsOfAFusedWeight) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;

  const Blocks q4("Q4_K"), q6("Q6_K"), q8("Q8_0");
  backend::Weight weight{
      256,
      {q4.segment(quant::QuantType::kQ4_K, 13), q6.segment(quant::QuantType::kQ6_K, 1),
       q8.segment(quant::QuantType::kQ8_0, 6)}};
  std::vector<float> rows(q4.values.begin(), q4.values.begin() + 13 * 256);
  rows.insert(rows.end(), q6.values.begin(), q6.values.begin() + 256);
  rows.insert(rows.end(), q8.values.begin(), q8.values.begin() + 6 * 256);

  for (uint32_t row = 0; row < 20; ++row) {
    std::vector<float> values(256);
    dequantize_row(weight, row, values);
    const auto expected = rows.begin() + row * 256;
    EXPECT_TRUE(std::equal(values.begin(), values.end(), expected)) << "row " << row;
  }

  ThreadPool pool(3);
  for (size_t tokens : {1, 2, 7}) {
    std::vector<float> input(tokens * 256), output(tokens * 20);
    for (float& x : input) x = normal(random);
    linear(pool, weight, input, output);
    for (size_t token = 0; token < tokens; ++token) {
      for (size_t row = 0; row < 20; ++row) {
        long double expected = 0, magnitude = 0;
        for (size_t c = 0; c < 256; ++c) {
          const long double product = (long double)rows[row * 256 + c] * input[token * 256 + c];
          expected += product;
          magnitude += std::abs(product);
        }
        // One rounding to float, 256 to double.
        const double bound =
            0x1p-24 * std::abs(double(expected)) + 256 * 0x1p-53 * double(magnitude);
        EXPECT_NEAR(output[token * 20 + row], double(expected), bound)
            << "token " << token << ", row " << row;
      }
    }
  }
}

}  // namespace
}  // namespace nibble::reference
