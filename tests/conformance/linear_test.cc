// The CPU's linear against the reference's, as callers see it: what 8-bit activations may cost is
// counted here, not taken from the kernels.

#include "cpu/linear/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "quant/quant_type.h"
#include "reference/linear.h"
#include "support/fixtures.h"

namespace nibble {
namespace {

using quant::QuantType;

constexpr uint32_t kFixtureRows = 24;  // of 256 values, quantised by ggml; random bits follow
constexpr uint32_t kColumns = 768;
constexpr double kUnitRoundoff = 0x1p-24;

// Whether linear.h promises f32 activations for the type.
bool keeps_activations(QuantType type) {
  return type != QuantType::kQ4_K && type != QuantType::kQ5_K && type != QuantType::kQ6_K &&
         type != QuantType::kQ8_0 && type != QuantType::kQ4_0;
}

// Most that may be lost of the product of w and x, both [kColumns].
double bound(const std::vector<float>& w, const float* x, bool f32_activations) {
  double terms = 0;
  if (f32_activations) {
    for (uint32_t k = 0; k < kColumns; ++k) terms += std::abs(double{w[k]} * x[k]);
    return 1.01 * (kColumns + 2) * kUnitRoundoff * terms;
  }
  double rounding = 0;  // of x to the nearest step
  for (uint32_t group = 0; group < kColumns; group += 32) {
    float largest_x = 0, largest_w = 0;
    double weights = 0;
    for (uint32_t k = group; k < group + 32; ++k) {
      largest_x = std::max(largest_x, std::abs(x[k]));
      largest_w = std::max(largest_w, std::abs(w[k]));
      weights += std::abs(w[k]);
    }
    rounding += weights * largest_x / 127 / 2;
    // What is summed are scale * quants and minimums, larger than their difference: what a
    // quantiser made of ordinary values has neither above 16 times the largest weight.
    terms += 32 * 16.0 * largest_w * largest_x;
  }
  return 1.01 * (rounding + (2 * kColumns / 16 + 3) * kUnitRoundoff * terms);
}

TEST(LinearConformance, EveryTypeOnEveryInstructionSet) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  constexpr size_t kRows = 11;
  std::vector<float> x(kRows * kColumns);
  for (float& value : x) value = normal(random);

  ThreadPool pool(2);
  for (const quant::QuantTraits& traits : quant::all_quant_traits()) {
    if (traits.block_values == 1) continue;  // the fixtures are of block formats
    SCOPED_TRACE(traits.name);
    const std::string blocks =
        test::read_file(test::fixture("quant/" + std::string(traits.name) + ".blocks"));
    const uint32_t weight_rows = kFixtureRows * 256 / kColumns;
    const backend::Weight weight{
        .columns = kColumns,
        .segments = {{"fixture", traits.type, weight_rows,
                      std::as_bytes(std::span(blocks))
                          .first(weight_rows * quant::row_bytes(traits.type, kColumns))}}};

    std::vector<float> expected(kRows * weight_rows), found(expected.size()), w(kColumns);
    reference::linear(pool, weight, x, expected);
    for (cpu::Isa isa : cpu::available_isas()) {
      SCOPED_TRACE(cpu::isa_name(isa));
      cpu::Linear(isa, pool, kRows, kColumns).run(weight, x.data(), kRows, found.data());
      for (uint32_t n = 0; n < weight_rows; ++n) {
        reference::dequantize_row(weight, n, w);
        for (size_t m = 0; m < kRows; ++m) {
          const size_t i = m * weight_rows + n;
          EXPECT_NEAR(found[i], expected[i],
                      bound(w, x.data() + m * kColumns, keeps_activations(traits.type)));
        }
      }
    }
  }
}

}  // namespace
}  // namespace nibble
