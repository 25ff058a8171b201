#include "quant/quant_type.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "support/fixtures.h"

namespace nibble::quant {
namespace {

std::vector<float> dequantize(const QuantTraits& traits, std::span<const std::byte> blocks) {
  std::vector<float> values(blocks.size() / traits.block_bytes * traits.block_values);
  traits.dequantize(blocks, values);
  return values;
}

void expect_same_bits(std::span<const float> actual, std::span<const float> expected) {
  ASSERT_EQ(actual.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    if (std::isnan(actual[i]) && std::isnan(expected[i])) continue;
    ASSERT_EQ(std::bit_cast<uint32_t>(actual[i]), std::bit_cast<uint32_t>(expected[i]))
        << "value " << i << ": " << actual[i] << " instead of " << expected[i];
  }
}

class BlockFormat : public testing::TestWithParam<const char*> {};

// 48 rows of 256 values: the first half quantised by ggml, the second random bits.
TEST_P(BlockFormat, DequantizesAsGgmlDoesBitForBit) {
  const std::string name = GetParam();
  const std::string file = test::read_file(test::fixture("quant/" + name + ".blocks"));
  const std::vector<float> expected = test::read_f32(test::fixture("quant/" + name + ".f32"));
  const auto traits = std::find_if(all_quant_traits().begin(), all_quant_traits().end(),
                                   [&](const QuantTraits& t) { return t.name == name; });
  ASSERT_NE(traits, all_quant_traits().end());
  ASSERT_EQ(expected.size(), 48u * 256);
  ASSERT_EQ(file.size(), 48 * row_bytes(traits->type, 256));

  // At every alignment: GGUF files choose their own.
  for (size_t shift = 0; shift < 4; ++shift) {
    std::vector<std::byte> bytes(shift + file.size());
    std::memcpy(bytes.data() + shift, file.data(), file.size());
    expect_same_bits(dequantize(*traits, std::span(bytes).subspan(shift)), expected);
  }
}

INSTANTIATE_TEST_SUITE_P(All, BlockFormat,
                         testing::Values("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K",
                                         "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4"),
                         [](const auto& info) { return std::string(info.param); });

TEST(FloatFormats, F32ComesOutAsItIs) {
  const std::vector<float> expected = {0.0f,       -0.0f, 1.5f,
                                       -3.25e-39f, 1e38f, std::numeric_limits<float>::infinity()};
  const auto values = dequantize(quant_traits(QuantType::kF32), std::as_bytes(std::span(expected)));
  expect_same_bits(values, expected);
}

TEST(FloatFormats, EveryHalfFollowsItsDefinition) {
  std::vector<uint16_t> bits(0x10000);
  std::vector<float> f16(bits.size()), bf16(bits.size());
  for (uint32_t i = 0; i < bits.size(); ++i) {
    bits[i] = uint16_t(i);
    const int exponent = i >> 10 & 0x1f;
    const int mantissa = i & 0x3ff;
    float magnitude = std::ldexp(float(exponent == 0 ? mantissa : mantissa + 1024),
                                 (exponent == 0 ? 1 : exponent) - 25);
    if (exponent == 31) magnitude = mantissa == 0 ? INFINITY : NAN;
    f16[i] = std::copysign(magnitude, i & 0x8000 ? -1.0f : 1.0f);
    bf16[i] = std::bit_cast<float>(i << 16);
  }
  const auto blocks = std::as_bytes(std::span(bits));
  expect_same_bits(dequantize(quant_traits(QuantType::kF16), blocks), f16);
  expect_same_bits(dequantize(quant_traits(QuantType::kBF16), blocks), bf16);
}

TEST(QuantTraits, TypeNumbersAreThoseOfGguf) {
  const std::pair<uint32_t, std::string_view> expected[] = {
      {0, "F32"},     {1, "F16"},     {2, "Q4_0"},  {3, "Q4_1"},  {6, "Q5_0"},  {7, "Q5_1"},
      {8, "Q8_0"},    {10, "Q2_K"},   {11, "Q3_K"}, {12, "Q4_K"}, {13, "Q5_K"}, {14, "Q6_K"},
      {20, "IQ4_NL"}, {23, "IQ4_XS"}, {30, "BF16"}, {39, "MXFP4"}};
  ASSERT_EQ(all_quant_traits().size(), std::size(expected));
  for (const auto& [number, name] : expected) {
    const QuantTraits* traits = find_quant_traits(number);
    ASSERT_NE(traits, nullptr) << name;
    EXPECT_EQ(traits->name, name);
    EXPECT_EQ(&quant_traits(static_cast<QuantType>(number)), traits);
  }
}

TEST(QuantTraits, NumbersOfNoSupportedTypeAreNotFound) {
  for (const uint32_t number : {4u, 5u, 9u, 15u, 16u, 24u, 31u, 40u, 1u << 31, UINT32_MAX}) {
    EXPECT_EQ(find_quant_traits(number), nullptr) << number;
  }
}

TEST(QuantTraits, RowBytesCountsWholeBlocks) {
  EXPECT_EQ(row_bytes(QuantType::kQ4_K, 512), 288u);
  EXPECT_EQ(row_bytes(QuantType::kQ8_0, 64), 68u);
  EXPECT_EQ(row_bytes(QuantType::kF32, 3), 12u);
  EXPECT_EQ(row_bytes(QuantType::kQ6_K, uint64_t{1} << 40), (uint64_t{1} << 32) * 210);
}

}  // namespace
}  // namespace nibble::quant
