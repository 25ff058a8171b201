#include "cpu/linear/linear.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/linear/kernels.h"

namespace nibble::cpu {
namespace {

using backend::Weight;
using quant::QuantType;
using Bytes = std::vector<std::byte>;

constexpr double kUnitRoundoff = 0x1p-24;

// Blocks of random bits whose values are finite and of ordinary size, in random order.
Bytes random_blocks(QuantType type, size_t count, std::mt19937& random) {
  const quant::QuantTraits& traits = quant::quant_traits(type);
  std::vector<Bytes> kinds;
  std::vector<float> values(traits.block_values);
  while (kinds.size() < 32) {
    Bytes block(traits.block_bytes);
    for (std::byte& byte : block) byte = std::byte(random());
    traits.dequantize(block, values);
    float largest = 0;
    for (float value : values) {
      // A NaN stays one and fails the comparison below.
      largest = std::abs(value) > largest || std::isnan(value) ? std::abs(value) : largest;
    }
    if (largest >= 0.1f && largest <= 10) kinds.push_back(block);
  }
  Bytes blocks;
  for (size_t i = 0; i < count; ++i) {
    const Bytes& kind = kinds[random() % kinds.size()];
    blocks.insert(blocks.end(), kind.begin(), kind.end());
  }
  return blocks;
}

// A weight and the bytes it refers to.
struct OwnedWeight {
  Weight weight;
  std::vector<Bytes> storage;

  explicit OwnedWeight(uint32_t columns) { weight.columns = columns; }

  void add(QuantType type, uint32_t rows, std::mt19937& random) {
    const size_t blocks = size_t{rows} * weight.columns / quant::quant_traits(type).block_values;
    storage.push_back(random_blocks(type, blocks, random));
    weight.segments.push_back({"test", type, rows, storage.back()});
  }
};

std::vector<float> random_activations(size_t count, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> x(count);
  for (float& value : x) value = normal(random);
  return x;
}

// x as the 8-bit kernels of `isa` see it.
std::vector<float> rounded(Isa isa, const std::vector<float>& x, uint32_t columns) {
  std::vector<ActivationGroup> groups(x.size() / ActivationGroup::kValues);
  for (size_t at = 0; at < x.size(); at += columns) {
    linear_kernels(isa).quantize(x.data() + at, columns,
                                 groups.data() + at / ActivationGroup::kValues);
  }
  std::vector<float> values(x.size());
  for (size_t i = 0; i < x.size(); ++i) {
    const ActivationGroup& group = groups[i / ActivationGroup::kValues];
    values[i] = group.scale * group.quants[i % ActivationGroup::kValues];
  }
  return values;
}

// Checks each y against sums in double, within what f32 sums may lose.
//
// Sums of n terms lose at most n * 2^-24 of the sum of the terms' magnitudes. With f32 activations
// the terms are the K products; two more roundings are those of the last additions. With 8-bit
// ones they are scale * quants and minimum of each group of 16 or 32, three roundings each, and
// since quants of random bits use their whole range, neither is above four times the block's
// largest weight.
void expect_close(Isa isa, const Weight& weight, const std::vector<float>& x, size_t rows,
                  const std::vector<float>& y) {
  const size_t columns = weight.columns;
  const std::vector<float> x8 =
      columns % ActivationGroup::kValues ? x : rounded(isa, x, weight.columns);
  std::vector<float> w(columns);
  for (uint32_t n = 0; n < weight.rows(); ++n) {
    gather_row(weight, n, w.data());
    uint32_t segment = 0;
    for (uint32_t first = 0; n >= first + weight.segments[segment].rows; ++segment) {
      first += weight.segments[segment].rows;
    }
    const bool quantized = has_quantized_activations(weight.segments[segment].type);
    const std::vector<float>& seen = quantized ? x8 : x;
    float largest = 0;
    for (float value : w) largest = std::max(largest, std::abs(value));
    for (size_t m = 0; m < rows; ++m) {
      double exact = 0, terms = 0;
      for (size_t k = 0; k < columns; ++k) {
        exact += double{w[k]} * seen[m * columns + k];
        terms += std::abs(seen[m * columns + k]) * (quantized ? 4.0 * largest : std::abs(w[k]));
      }
      const double additions = quantized ? 2.0 * columns / 16 + 3 : columns + 2.0;
      const double bound = additions * kUnitRoundoff * 1.01 * terms;
      ASSERT_NEAR(y[m * weight.rows() + n], exact, bound)
          << "row " << n << " of " << weight.rows() << ", activation row " << m << " of " << rows
          << ", columns " << columns;
    }
  }
}

std::vector<float> run(Linear& linear, const Weight& weight, const std::vector<float>& x,
                       size_t rows) {
  std::vector<float> y(rows * weight.rows(), std::numeric_limits<float>::quiet_NaN());
  linear.run(weight, x.data(), rows, y.data());
  return y;
}

std::vector<QuantType> all_types() {
  std::vector<QuantType> types;
  for (const quant::QuantTraits& traits : quant::all_quant_traits()) types.push_back(traits.type);
  return types;
}

class LinearTest : public testing::TestWithParam<std::tuple<Isa, QuantType>> {
 protected:
  const Isa isa = std::get<0>(GetParam());
  const QuantType type = std::get<1>(GetParam());
  const uint32_t block_values = quant::quant_traits(type).block_values;
  const uint32_t seed = std::random_device{}();
  std::mt19937 random{seed};
  testing::ScopedTrace trace{__FILE__, __LINE__, "seed " + std::to_string(seed)};
};

TEST_P(LinearTest, EqualsTheExactProduct) {
  ThreadPool pool(2);
  const uint32_t widest = 1024;
  Linear linear(isa, pool, 512, widest);
  for (size_t rows : {1, 2, 3, 5, 8, 17, 64, 512}) {
    const uint32_t columns = (1 + random() % (widest / block_values)) * block_values;
    const uint32_t weight_rows = 1 + random() % (rows < 64 ? 70 : 20);
    OwnedWeight owned(columns);
    owned.add(type, weight_rows, random);
    const std::vector<float> x = random_activations(rows * columns, random);
    ASSERT_NO_FATAL_FAILURE(
        expect_close(isa, owned.weight, x, rows, run(linear, owned.weight, x, rows)));
  }
}

TEST_P(LinearTest, DependsNeitherOnTheBatchNorOnTheThreads) {
  ThreadPool one(1), three(3);
  constexpr size_t kRows = 13;
  const uint32_t columns = block_values * std::max(1u, 512 / block_values);
  OwnedWeight owned(columns);
  owned.add(type, 45, random);
  Linear linear(isa, three, kRows, columns), alone(isa, one, 1, columns);
  const std::vector<float> x = random_activations(kRows * columns, random);
  const std::vector<float> together = run(linear, owned.weight, x, kRows);
  for (size_t m = 0; m < kRows; ++m) {
    const std::vector<float> row(x.begin() + m * columns, x.begin() + (m + 1) * columns);
    const std::vector<float> y = run(alone, owned.weight, row, 1);
    EXPECT_TRUE(std::equal(y.begin(), y.end(), together.begin() + m * y.size())) << "row " << m;
  }
}

TEST_P(LinearTest, AnyBitsInABlockStayInTheirRow) {
  ThreadPool pool(1);
  const uint32_t columns = block_values * std::max(1u, 256 / block_values);
  OwnedWeight owned(columns);
  owned.add(type, 40, random);
  Linear linear(isa, pool, 3, columns);
  const std::vector<float> x = random_activations(3 * columns, random);
  const std::vector<float> clean = run(linear, owned.weight, x, 3);

  const uint32_t bad_row = random() % 40;
  const size_t row_bytes = quant::row_bytes(type, columns);
  for (int fill : {0xff, 0x7c, 0x80, 0}) {  // NaN, infinite and zero scales
    std::fill_n(owned.storage[0].begin() + bad_row * row_bytes, row_bytes, std::byte(fill));
    const std::vector<float> y = run(linear, owned.weight, x, 3);
    for (size_t i = 0; i < y.size(); ++i) {
      if (i % 40 != bad_row) {
        ASSERT_EQ(y[i], clean[i]) << i;
      }
    }
  }
}

TEST_P(LinearTest, NanAndInfinityInActivationsStayInTheirRowAndAreSeen) {
  ThreadPool pool(1);
  const uint32_t columns = block_values * std::max(1u, 256 / block_values);
  OwnedWeight owned(columns);
  owned.add(type, 9, random);
  Linear linear(isa, pool, 6, columns);
  std::vector<float> x = random_activations(6 * columns, random);
  const std::vector<float> clean = run(linear, owned.weight, x, 6);
  x[2 * columns + random() % columns] = std::numeric_limits<float>::quiet_NaN();
  x[4 * columns + random() % columns] = -std::numeric_limits<float>::infinity();
  const std::vector<float> y = run(linear, owned.weight, x, 6);
  for (size_t i = 0; i < y.size(); ++i) {
    if (i / 9 == 2 || i / 9 == 4) {
      EXPECT_FALSE(std::isfinite(y[i])) << i;
    } else {
      EXPECT_EQ(y[i], clean[i]) << i;
    }
  }
}

std::string parameter_name(const testing::TestParamInfo<LinearTest::ParamType>& info) {
  return std::string(isa_name(std::get<0>(info.param))) + "_" +
         std::string(quant::quant_traits(std::get<1>(info.param)).name);
}

const std::vector<Isa> kIsas(available_isas().begin(), available_isas().end());

INSTANTIATE_TEST_SUITE_P(Kernels, LinearTest,
                         testing::Combine(testing::ValuesIn(kIsas), testing::ValuesIn(all_types())),
                         parameter_name);

class LinearIsaTest : public testing::TestWithParam<Isa> {
 protected:
  const Isa isa = GetParam();
  const uint32_t seed = std::random_device{}();
  std::mt19937 random{seed};
  testing::ScopedTrace trace{__FILE__, __LINE__, "seed " + std::to_string(seed)};
};

TEST_P(LinearIsaTest, FusedWeightsKeepTheirTypesAndOrder) {
  ThreadPool pool(2);
  OwnedWeight owned(512);
  owned.add(QuantType::kQ4_K, 37, random);
  owned.add(QuantType::kF16, 1, random);
  owned.add(QuantType::kQ6_K, 16, random);
  owned.add(QuantType::kIQ4_XS, 5, random);
  Linear linear(isa, pool, 10, 512);
  for (size_t rows : {1, 10}) {
    const std::vector<float> x = random_activations(rows * 512, random);
    ASSERT_NO_FATAL_FAILURE(
        expect_close(isa, owned.weight, x, rows, run(linear, owned.weight, x, rows)));
  }
}

TEST_P(LinearIsaTest, EightBitActivationsAreTheNearestOnes) {
  constexpr uint32_t kColumns = 32 * 64;
  std::vector<float> x = random_activations(kColumns, random);
  for (float& value : x) value = std::ldexp(value, int(random() % 60) - 30);
  std::fill_n(x.begin(), 32, 0.0f);
  std::vector<ActivationGroup> groups(kColumns / 32);
  linear_kernels(isa).quantize(x.data(), kColumns, groups.data());
  for (uint32_t g = 0; g < groups.size(); ++g) {
    const ActivationGroup& group = groups[g];
    int halves[2] = {};
    for (uint32_t i = 0; i < 32; ++i) {
      EXPECT_LE(std::abs(int{group.quants[i]}), 127);
      halves[i / 16] += group.quants[i];
      // Scale, inverse and quotient are rounded once each.
      EXPECT_NEAR(x[32 * g + i], double{group.scale} * group.quants[i],
                  group.scale * (0.5 + 127 * 4 * kUnitRoundoff));
    }
    EXPECT_FLOAT_EQ(group.half_sums[0], group.scale * halves[0]);
    EXPECT_FLOAT_EQ(group.half_sums[1], group.scale * halves[1]);
    EXPECT_FLOAT_EQ(group.sum, group.scale * (halves[0] + halves[1]));
  }
  EXPECT_EQ(groups[0].scale, 0);
}

INSTANTIATE_TEST_SUITE_P(Kernels, LinearIsaTest, testing::ValuesIn(kIsas),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST(LinearWorkspace, CountsWhatItTakes) {
  ThreadPool pool(2);
  Linear linear(Isa::kScalar, pool, 64, 1024);
  EXPECT_GE(linear.workspace_bytes(), 64 * 1024 / 32 * sizeof(ActivationGroup));
}

TEST(GatherRow, DequantizesOneRowOfTheRightSegment) {
  std::mt19937 random(std::random_device{}());
  OwnedWeight owned(256);
  owned.add(QuantType::kQ8_0, 3, random);
  owned.add(QuantType::kQ6_K, 4, random);
  std::vector<float> row(256), expected(256);
  gather_row(owned.weight, 5, row.data());
  const size_t row_bytes = quant::row_bytes(QuantType::kQ6_K, 256);
  quant::quant_traits(QuantType::kQ6_K)
      .dequantize(std::span(owned.storage[1]).subspan(2 * row_bytes, row_bytes), expected);
  EXPECT_EQ(row, expected);
}

}  // namespace
}  // namespace nibble::cpu
