#include "base/half.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

namespace nibble {
namespace {

// Rounds to `mantissa_bits` explicit bits with exponents from `min_exponent`, in doubles, which
// hold every intermediate exactly. To nearest, ties to even, is nearbyint's default.
double rounded(double x, int mantissa_bits, int min_exponent, double largest) {
  if (x == 0 || !std::isfinite(x)) return x;
  const int exponent = std::max(std::ilogb(x), min_exponent);
  const double unit = std::ldexp(1.0, exponent - mantissa_bits);
  const double result = std::nearbyint(x / unit) * unit;
  return std::abs(result) > largest ? std::copysign(INFINITY, x) : result;
}

// Random bits, and the neighbourhood of every boundary: all exponents, ties and next to ties.
std::vector<float> probes() {
  const uint32_t seed = std::random_device()();
  ::testing::Test::RecordProperty("seed", int(seed));
  std::mt19937 random(seed);
  std::vector<float> values;
  for (int i = 0; i < 200000; ++i) values.push_back(std::bit_cast<float>(uint32_t(random())));
  for (uint32_t exponent = 0; exponent < 256; ++exponent) {
    for (uint32_t mantissa :
         {0x0u,     0x1u,     0xfffu,    0x1000u,   0x1001u,   0x1fffu,   0x2000u,
          0x2fffu,  0x3000u,  0x3001u,   0x7fffu,   0x8000u,   0x8001u,   0x17fffu,
          0x18000u, 0x18001u, 0x7fdfffu, 0x7fefffu, 0x7ff000u, 0x7f8000u, 0x7fffffu}) {
      const uint32_t bits = exponent << 23 | mantissa;
      values.push_back(std::bit_cast<float>(bits));
      values.push_back(std::bit_cast<float>(bits | 0x80000000u));
    }
  }
  return values;
}

TEST(Half, EveryHalfSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t half = uint16_t(bits);
    const float value = f16_to_f32(half);
    if (std::isnan(value)) {
      EXPECT_EQ(f32_to_f16(value), half | 0x200) << bits;  // signalling NaNs come back quiet
    } else {
      EXPECT_EQ(f32_to_f16(value), half) << bits;
    }
  }
}

TEST(Half, ValuesAreTheFormula) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const int exponent = int(bits >> 10 & 0x1f);
    const double mantissa = bits & 0x3ff;
    if (exponent == 0x1f) {
      EXPECT_EQ(std::isinf(f16_to_f32(uint16_t(bits))), mantissa == 0) << bits;
      continue;
    }
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    EXPECT_EQ(f16_to_f32(uint16_t(bits)), bits & 0x8000 ? -magnitude : magnitude) << bits;
  }
}

TEST(Half, RoundsToNearestEven) {
  for (float value : probes()) {
    const float result = f16_to_f32(f32_to_f16(value));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(result));
    } else {
      EXPECT_EQ(result, rounded(value, 10, -14, 65504)) << std::hexfloat << value;
      EXPECT_EQ(std::signbit(result), std::signbit(value)) << std::hexfloat << value;
    }
  }
}

TEST(BFloat, EveryValueSurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const uint16_t bfloat = uint16_t(bits);
    const float value = bf16_to_f32(bfloat);
    EXPECT_EQ(f32_to_bf16(value), std::isnan(value) ? bfloat | 0x40 : bfloat) << bits;
  }
}

TEST(BFloat, RoundsToNearestEven) {
  const double largest = bf16_to_f32(0x7f7f);
  for (float value : probes()) {
    const float result = bf16_to_f32(f32_to_bf16(value));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(result));
    } else {
      EXPECT_EQ(result, rounded(value, 7, -126, largest)) << std::hexfloat << value;
      EXPECT_EQ(std::signbit(result), std::signbit(value)) << std::hexfloat << value;
    }
  }
}

}  // namespace
}  // namespace nibble
