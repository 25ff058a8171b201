// Every kernel on every instruction set against its formula in doubles. With u = 2^-24, a rounding
// is a factor within 1 +- u; tolerances count roundings.

#include "cpu/elementwise/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "base/half.h"

namespace nibble::cpu {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kExponential = 4 * kUnit;  // relative error of e^x (cpu/simd.h)

const size_t kWidths[] = {1, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 255, 512, 1536, 5377};

class Elementwise : public ::testing::TestWithParam<Isa> {
 protected:
  std::vector<float> random_values(size_t n, float deviation) {
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> values(n);
    for (float& x : values) x = normal(random_);
    return values;
  }

  const ElementwiseKernels& kernels_ = elementwise_kernels(GetParam());
  const uint32_t seed_ = std::random_device()();
  std::mt19937 random_{seed_};
  const ::testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
};

INSTANTIATE_TEST_SUITE_P(, Elementwise,
                         ::testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

TEST_P(Elementwise, RunsOnTheVectorsAskedFor) {
  constexpr uint32_t kLanes[] = {1, 8, 16, 4};  // in the order of Isa
  EXPECT_EQ(kernels_.lanes, kLanes[size_t(GetParam())]);
}

TEST_P(Elementwise, RmsNorm) {
  for (size_t width : kWidths) {
    const float epsilon = 1e-6f;
    const std::vector<float> x = random_values(width, 3);
    const std::vector<float> weight = random_values(width, 1);
    double squares = 0;
    for (float v : x) squares += double(v) * v;
    const double factor = 1 / std::sqrt(squares / double(width) + double(epsilon));
    // A sum of positive terms is off by a rounding for each term of its longest chain (four chains,
    // up to 4 * 16 terms in the tail, the final sums); the square root halves that. Then the mean,
    // the sum with epsilon, root, reciprocal and two products.
    const double tolerance = (double(width) / 4 + 64 + 8) / 2 * kUnit + 6 * kUnit;
    std::vector<float> weighted(width), in_place = x;
    kernels_.rms_norm(x.data(), weight.data(), width, epsilon, weighted.data());
    kernels_.rms_norm(in_place.data(), nullptr, width, epsilon, in_place.data());
    for (size_t i = 0; i < width; ++i) {
      const double plain = x[i] * factor;
      EXPECT_NEAR(in_place[i], plain, std::abs(plain) * tolerance) << i << " of " << width;
      EXPECT_NEAR(weighted[i], plain * weight[i], std::abs(plain * weight[i]) * tolerance)
          << i << " of " << width;
    }
  }
}

TEST_P(Elementwise, RmsNormOfZerosIsZero) {
  std::vector<float> x(40, 0.0f);
  kernels_.rms_norm(x.data(), nullptr, x.size(), 1e-6f, x.data());
  EXPECT_EQ(x, std::vector<float>(40, 0.0f));
}

TEST_P(Elementwise, AddAndScale) {
  for (size_t width : kWidths) {
    const std::vector<float> x = random_values(width, 1);
    const std::vector<float> before = random_values(width, 1);
    std::vector<float> out = before;
    kernels_.add_and_scale(x.data(), width, 0.37f, out.data());
    for (size_t i = 0; i < width; ++i) {
      const double exact = (double(before[i]) + x[i]) * double(0.37f);
      EXPECT_NEAR(out[i], exact, std::abs(exact) * 2.01 * kUnit);
    }
  }
}

TEST_P(Elementwise, GatedGelu) {
  for (size_t width : kWidths) {
    std::vector<float> gate = random_values(width, 4);
    const std::vector<float> up = random_values(width, 2);
    const float edges[] = {0, 1e-30f, -1e-30f, 9, -9, 11.5f, -11.5f, -30, 30, 1e6f, -1e6f};
    for (size_t i = 0; i < std::min(width / 2, std::size(edges)); ++i) gate[i] = edges[i];
    std::vector<float> out(width);
    kernels_.gated_gelu(gate.data(), up.data(), width, out.data());
    for (size_t i = 0; i < width; ++i) {
      const double x = gate[i];
      const double power = 2 * std::sqrt(2 / std::numbers::pi) * (x + double(0.044715) * x * x * x);
      const double exact = x / (1 + std::exp(-power)) * up[i];
      // The power is made with 5 roundings, its error times the power is that of e^power; then the
      // exponential, sum, quotient and product. Far out e^power stops growing at e^88.3.
      const double tolerance =
          std::abs(exact) * ((5 * std::abs(power) + 3.1) * kUnit + kExponential);
      const double underflow = 1e-38 * std::max(1.0, std::abs(x * up[i]));
      EXPECT_NEAR(out[i], exact, tolerance + underflow) << "gelu(" << x << ") * " << up[i];
    }
  }
}

TEST_P(Elementwise, Rotate) {
  for (size_t half : {1, 4, 5, 8, 20, 32, 64, 128, 256}) {
    std::vector<float> cosines(half), sines(half);
    for (size_t d = 0; d < half; ++d) {
      cosines[d] = std::cos(float(d) * 0.7f);
      sines[d] = std::sin(float(d) * 0.7f);
    }
    const std::vector<float> before = random_values(2 * half, 1);
    std::vector<float> x = before;
    kernels_.rotate(cosines.data(), sines.data(), half, x.data());
    for (size_t d = 0; d < half; ++d) {
      const double low = before[d], high = before[d + half];
      const double c = cosines[d], s = sines[d];
      EXPECT_NEAR(x[d], low * c - high * s,
                  2.01 * kUnit * (std::abs(low * c) + std::abs(high * s)));
      EXPECT_NEAR(x[d + half], high * c + low * s,
                  2.01 * kUnit * (std::abs(high * c) + std::abs(low * s)));
    }
  }
}

TEST_P(Elementwise, Softcap) {
  const float cap = 30;
  std::vector<float> x = random_values(5000, 40);
  for (float edge : {0.0f, 1e-20f, -1e-5f, 18.74f, 18.76f, -18.74f, -18.76f, 1e4f, -1e4f, 1e30f}) {
    x.push_back(edge);
  }
  std::vector<float> capped = x;
  kernels_.softcap(cap, capped.size(), capped.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = cap * std::tanh(double(x[i]) / cap);
    // Worst just beyond -0.625: 2 / (e^2y + 1) is 1.55 with an error of 4.5 u, tanh is 0.55, which
    // makes 9 u; then the difference, the argument and the product.
    EXPECT_NEAR(capped[i], exact, std::abs(exact) * 13 * kUnit) << x[i];
  }
}

TEST_P(Elementwise, NanStaysNan) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> x(40, nan), ones(40, 1.0f), out(40, 0.0f);
  kernels_.gated_gelu(x.data(), ones.data(), x.size(), out.data());
  for (float v : out) EXPECT_TRUE(std::isnan(v));
  kernels_.softcap(30, x.size(), x.data());
  for (float v : x) EXPECT_TRUE(std::isnan(v));
}

TEST_P(Elementwise, Scale) {
  std::vector<float> x = random_values(77, 1);
  const std::vector<float> before = x;
  kernels_.scale(1.7f, x.size(), x.data());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(x[i], 1.7f * before[i]);
}

TEST_P(Elementwise, ToF16RoundsLikeTheSoftware) {
  std::vector<float> x = random_values(1003, 100);
  for (float edge : {0.0f, -0.0f, 65519.0f, 65520.0f, 1e-8f, 3e-8f, 1e30f, 1.00048828125f}) {
    x.push_back(edge);
  }
  std::vector<uint16_t> halves(x.size());
  kernels_.to_f16(x.data(), x.size(), halves.data());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(halves[i], f32_to_f16(x[i])) << x[i];
}

}  // namespace
}  // namespace nibble::cpu
