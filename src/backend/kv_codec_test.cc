#include "backend/kv_codec.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_tq4.h"
#include "base/half.h"

namespace nibble::backend {
namespace {

KvRowLayout layout_of(KvFormat format, uint32_t values, uint32_t block) {
  return {.format = format, .values = values, .block = block};
}

class KvCodec : public testing::Test {
 protected:
  std::vector<float> random_values(size_t count, float deviation = 1) {
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> values(count);
    for (float& x : values) x = normal(random_);
    return values;
  }

  const unsigned seed_ = std::random_device()();
  std::mt19937 random_{seed_};
  const testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
};

std::vector<float> coded(const KvRowLayout& layout, std::span<const float> values) {
  std::vector<std::byte> head(layout.head_bytes());
  encode_kv_row(layout, values, head.data(), 5);
  std::vector<float> result(values.size());
  decode_kv_row(layout, head.data(), 5, result);
  return result;
}

double square_error(std::span<const float> a, std::span<const float> b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
  return sum;
}

TEST_F(KvCodec, FloatsAreAsTheyAre) {
  const std::vector<float> values = random_values(64);
  EXPECT_EQ(coded(layout_of(KvFormat::kF32, 64, 0), values), values);
  const std::vector<float> halves = coded(layout_of(KvFormat::kF16, 64, 0), values);
  for (size_t i = 0; i < 64; ++i) EXPECT_EQ(halves[i], f16_to_f32(f32_to_f16(values[i])));
}

TEST_F(KvCodec, RowsLieApart) {
  for (const KvRowLayout layout :
       {layout_of(KvFormat::kF32, 64, 0), layout_of(KvFormat::kF16, 64, 0),
        layout_of(KvFormat::kQ8, 64, 32), layout_of(KvFormat::kTq4, 64, 32),
        layout_of(KvFormat::kTq4, 128, 128)}) {
    std::vector<std::byte> head(layout.head_bytes(), std::byte{0xff});
    std::vector<std::vector<float>> rows;
    for (uint32_t row = 0; row < kKvPageTokens; ++row) {
      rows.push_back(random_values(layout.values));
      encode_kv_row(layout, rows[row], head.data(), row);
    }
    for (uint32_t row = 0; row < kKvPageTokens; ++row) {
      std::vector<float> read(layout.values);
      decode_kv_row(layout, head.data(), row, read);
      EXPECT_EQ(read, coded(layout, rows[row])) << to_string(layout.format) << " row " << row;
    }
  }
}

// Half a step of absmax / 127, whose f16 scale is off by 2^-11, which the largest values feel most.
TEST_F(KvCodec, Q8IsOffByHalfAStep) {
  for (const float deviation : {1e-3f, 1.0f, 3e3f}) {
    const std::vector<float> values = random_values(640, deviation);
    const std::vector<float> read = coded(layout_of(KvFormat::kQ8, 640, 32), values);
    for (size_t block = 0; block < 640; block += 32) {
      float largest = 0;
      for (size_t i = 0; i < 32; ++i) largest = std::max(largest, std::abs(values[block + i]));
      for (size_t i = block; i < block + 32; ++i) {
        EXPECT_NEAR(read[i], values[i], largest * (0.5 / 127 + 0x1p-10));
      }
    }
  }
}

TEST_F(KvCodec, RotationIsOrthogonalAndUndone) {
  for (const size_t size : {32u, 64u, 128u}) {
    const std::vector<float> x = random_values(size), y = random_values(size);
    std::vector<float> turned_x = x, turned_y = y;
    tq4_rotate(turned_x);
    tq4_rotate(turned_y);
    double dot = 0, turned_dot = 0;
    for (size_t i = 0; i < size; ++i) {
      dot += double(x[i]) * y[i];
      turned_dot += double(turned_x[i]) * turned_y[i];
    }
    EXPECT_NEAR(dot, turned_dot, 1e-4);
    tq4_rotate_back(turned_x);
    for (size_t i = 0; i < size; ++i) EXPECT_NEAR(turned_x[i], x[i], 1e-5);
  }
}

// The document's formula: entry (i, j) is (-1)^popcount(i & j) / sqrt(n), then column signs.
TEST_F(KvCodec, RotationIsTheDocumentedMatrix) {
  for (const size_t size : {32u, 64u, 128u}) {
    for (size_t j = 0; j < size; ++j) {
      std::vector<float> unit(size);
      unit[j] = 1;
      tq4_rotate(unit);
      const bool negative = (kTq4Signs[j / 32] >> j % 32 & 1) != 0;
      for (size_t i = 0; i < size; ++i) {
        const bool odd = __builtin_popcountll(i & j) % 2 != 0;
        EXPECT_FLOAT_EQ(unit[i], (odd != negative ? -1 : 1) / std::sqrt(float(size)));
      }
    }
  }
}

TEST_F(KvCodec, Tq4KeepsTheLengthOfABlock) {
  for (const uint32_t block : {32u, 64u, 128u}) {
    const std::vector<float> values = random_values(block, 7);
    const std::vector<float> read = coded(layout_of(KvFormat::kTq4, block, block), values);
    double before = 0, after = 0;
    for (uint32_t i = 0; i < block; ++i) {
      before += double(values[i]) * values[i];
      after += double(read[i]) * read[i];
    }
    EXPECT_NEAR(std::sqrt(after / before), 1, 0x1p-10);  // its f16
  }
}

// Lloyd-Max of 16 levels distorts a Gaussian by 0.0095 of its variance. TurboQuant proves at most
// sqrt(3) pi / 2 / 4^bits = 0.0106 (theorem 1), and no quantiser can do better than 4^-bits =
// 0.0039 (theorem 3). Outliers change nothing: the rotation spreads them.
TEST_F(KvCodec, Tq4DistortionIsTheBoundsWhateverTheData) {
  for (const uint32_t block : {32u, 64u, 128u}) {
    for (const bool outliers : {false, true}) {
      double error = 0, total = 0;
      for (int row = 0; row < 2000; ++row) {
        std::vector<float> values = random_values(block);
        if (outliers) values[row % 7] *= 30;
        const std::vector<float> read = coded(layout_of(KvFormat::kTq4, block, block), values);
        error += square_error(values, read);
        for (const float x : values) total += double(x) * x;
      }
      EXPECT_LT(error / total, 0.0106) << "block " << block << ", outliers " << outliers;
      EXPECT_GT(error / total, 0.0039);
    }
  }
}

TEST_F(KvCodec, ZeroIsZero) {
  for (const KvFormat format : {KvFormat::kQ8, KvFormat::kTq4}) {
    const std::vector<float> zeros(64);
    EXPECT_EQ(coded(layout_of(format, 64, 32), zeros), zeros);
  }
}

TEST_F(KvCodec, WhatIsNotFiniteStaysSo) {
  for (const KvFormat format : {KvFormat::kF16, KvFormat::kQ8, KvFormat::kTq4}) {
    for (const float bad : {NAN, INFINITY, 1e38f}) {
      std::vector<float> values = random_values(64);
      values[40] = bad;
      const std::vector<float> read = coded(layout_of(format, 64, 32), values);
      EXPECT_FALSE(std::isfinite(read[40])) << to_string(format) << " " << bad;
      for (size_t i = 0; i < 32; ++i) EXPECT_TRUE(std::isfinite(read[i]));
    }
  }
}

// Every magnitude and sign at every place of a word, by the document's bit positions.
TEST_F(KvCodec, Tq4WordsAreAsDocumented) {
  const KvRowLayout layout = layout_of(KvFormat::kTq4, 32, 32);
  for (uint32_t i = 0; i < 8; ++i) {
    for (uint32_t index = 0; index < 8; ++index) {
      std::vector<std::byte> head(layout.head_bytes());
      uint32_t word = index << 4 * i;
      word |= 1u << (i < 4 ? 8 * i + 7 : 8 * i - 29);
      std::memcpy(head.data() + 2 * 16 + 4, &word, 4);  // second word of row 2
      const uint16_t half = f32_to_f16(0.5f);
      std::memcpy(head.data() + 32 * 16 + 2 * 2, &half, 2);
      std::vector<float> read(32);
      decode_kv_row(layout, head.data(), 2, read);
      tq4_rotate(read);
      EXPECT_NEAR(read[8 + i], -0.5f * f16_to_f32(kTq4Magnitudes[index]), 1e-5);
    }
  }
}

}  // namespace
}  // namespace nibble::backend
