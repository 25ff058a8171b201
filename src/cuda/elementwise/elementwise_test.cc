// Every kernel against its formula on the host, in doubles.

#include "cuda/elementwise/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "base/error.h"
#include "base/half.h"
#include "cuda/device_array.h"
#include "cuda/layouts/activation_blocks.h"
#include "cuda/layouts/pack.h"
#include "cuda/test_support.h"

namespace nibble::cuda {
namespace {

class Elementwise : public testing::Test {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }

  std::vector<float> normal(size_t count, float size = 1) {
    std::normal_distribution<float> distribution(0, size);
    std::vector<float> values(count);
    for (float& value : values) value = distribution(random_);
    return values;
  }

  const uint32_t seed_ = std::random_device{}();
  const testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
  std::mt19937 random_{seed_};
};

// Activation rows in device memory, poisoned.
struct Rows {
  Rows(uint32_t rows, uint32_t width)
      : rows(rows),
        in_blocks(rows > kMostRows || (rows > kMatrixTokens && rows % 2 == 0)),
        width(width),
        tiles(TileGrid(1, width).column_tiles),
        values(std::vector<uint16_t>(size_t(rows + kMostRows) * tiles * kTileColumns, 0xffff)),
        means(size_t(activation_stride(rows)) * tiles),
        scales(std::vector<float>(rows, NAN)) {
    NIBBLE_CUDA(cudaMemset(means.data(), 0xff, means.size() * sizeof(ActivationMeans)));
  }
  ScaledRows device() const {
    return {{values.data(), means.data(), rows, tiles, in_blocks}, scales.data()};
  }

  // Expects the values within f16's rounding, the means, and a scale only where one is needed, or
  // the given one.
  void expect(const std::vector<double>& expected, double wanted_scale = 0) const {
    NIBBLE_CUDA(cudaDeviceSynchronize());
    const auto halves = values.download();
    const auto stored_means = means.download();
    const auto row_scales = scales.download();
    const uint32_t stride = activation_stride(rows);
    for (uint32_t row = 0; row < rows; ++row) {
      const double scale = row_scales[row];
      double largest = 0;
      for (uint32_t c = 0; c < width; ++c)
        largest = std::max(largest, std::abs(expected[size_t(row) * width + c]));
      if (wanted_scale != 0 || largest < 65000) {
        ASSERT_EQ(scale, wanted_scale != 0 ? wanted_scale : 1);
      }
      std::vector<double> sums(tiles * 8);
      for (uint32_t c = 0; c < tiles * kTileColumns; ++c) {
        const double value =
            f16_to_f32(halves[in_blocks ? activation_block_index(row, c, (rows + 7) / 8)
                                        : activation_index(row, c, stride)]);
        sums[c / 32] += value;
        const double wanted = c < width ? expected[size_t(row) * width + c] : 0;
        // Half a unit of f16, of its smallest numbers too, and what f32 loses on the way.
        ASSERT_NEAR(value * scale, wanted,
                    std::abs(wanted) * 0x1.1p-11 + scale * 0x1p-25 + largest * 0x1p-20)
            << "row " << row << ", column " << c;
      }
      for (uint32_t group = 0; !in_blocks && group < sums.size(); ++group) {
        const auto& parts = stored_means[size_t(group / 8) * stride + row].parts[group % 8 / 2];
        const double mean = f16_to_f32(parts[0][group % 2]) + f16_to_f32(parts[1][group % 2]);
        ASSERT_NEAR(mean, sums[group] / 32,
                    std::abs(sums[group] / 32) * 0x1p-20 + 0x1p-24 + largest / scale * 0x1p-22)
            << "row " << row << ", group " << group;
      }
    }
  }

  uint32_t rows;
  bool in_blocks;
  uint32_t width, tiles;
  DeviceArray<uint16_t> values;
  DeviceArray<ActivationMeans> means;
  DeviceArray<float> scales;
};

std::vector<double> normed(const std::vector<double>& x, uint32_t width,
                           const std::vector<float>& weight, double epsilon) {
  std::vector<double> result(x.size());
  for (size_t begin = 0; begin < x.size(); begin += width) {
    double squares = 0;
    for (uint32_t c = 0; c < width; ++c) squares += x[begin + c] * x[begin + c];
    for (uint32_t c = 0; c < width; ++c)
      result[begin + c] =
          x[begin + c] / std::sqrt(squares / width + epsilon) * (weight.empty() ? 1.0 : weight[c]);
  }
  return result;
}

struct Shape {
  uint32_t rows, width;
};
// One row to many, rows of less than a tile, of no whole tiles, of all warps and of more.
constexpr Shape kShapes[] = {{1, 5376}, {8, 256},  {3, 104},    {2, 520}, {13, 288},
                             {1, 8192}, {2, 9000}, {129, 1096}, {130, 88}};

TEST_F(Elementwise, UpdateAddsTheNormedProductAndNormsTheResult) {
  for (const auto& [rows, width] : kShapes) {
    for (const bool has_post_norm : {true, false}) {
      const bool in_range = random_() % 2 == 0;  // true of both; the kernel may take it as unknown
      SCOPED_TRACE(testing::Message() << rows << " x " << width << ", post norm " << has_post_norm
                                      << ", in range " << in_range);
      constexpr uint32_t kParts = 4;
      const auto parts = normal(size_t(kParts) * rows * width), residual = normal(rows * width);
      const auto post = normal(width), next = normal(width);
      std::vector<float> scales(rows, 1);
      scales[rows - 1] = 4;
      std::vector<double> product(rows * width);
      for (uint32_t p = 0; p < kParts; ++p) {
        for (size_t i = 0; i < product.size(); ++i)
          product[i] += double(parts[p * product.size() + i]) * scales[i / width];
      }
      if (has_post_norm) product = normed(product, width, post, 1e-6);
      for (size_t i = 0; i < product.size(); ++i) product[i] = (product[i] + residual[i]) * 0.75;

      const DeviceArray<float> d_parts{std::span(parts)}, d_residual{std::span(residual)},
          d_post{std::span(post)}, d_next{std::span(next)},
          d_scales{std::span<const float>(scales)};
      const Rows out(rows, width);
      launch_update(nullptr, {.sums = {d_parts.data(), kParts, rows, width},
                              .scales = d_scales.data(),
                              .width = width,
                              .has_post_norm = has_post_norm,
                              .post_norm = {d_post.data(), 1e-6f, true},
                              .output_scale = 0.75f,
                              .residual = d_residual.data(),
                              .next_norm = {d_next.data(), 1e-6f, in_range},
                              .normed = out.device()});
      NIBBLE_CUDA(cudaDeviceSynchronize());
      const auto updated = d_residual.download();
      for (size_t i = 0; i < updated.size(); ++i)
        ASSERT_NEAR(updated[i], product[i], 1e-5 * (1 + std::abs(product[i]))) << i;
      out.expect(normed(product, width, next, 1e-6));
    }
  }
}

// Where a product takes nearly all of a residual away, the norm is still that of what is left.
TEST_F(Elementwise, UpdateNormsASmallDifferenceOfLargeRows) {
  constexpr uint32_t kWidth = 3000;
  std::vector<float> product(kWidth), residual(kWidth), one{1};
  std::vector<double> left(kWidth);
  for (uint32_t i = 0; i < kWidth; ++i) {
    product[i] = float(int(random_() % 255) - 127);
    residual[i] = product[i] * (1.0f / 128 - 1);
    left[i] = product[i] / 128;
  }
  const DeviceArray<float> d_product{std::span<const float>(product)},
      d_residual{std::span<const float>(residual)}, d_scales{std::span<const float>(one)};
  const Rows out(1, kWidth);
  launch_update(nullptr, {.sums = {d_product.data(), 1, 1, kWidth},
                          .scales = d_scales.data(),
                          .width = kWidth,
                          .has_post_norm = false,
                          .post_norm = {},
                          .output_scale = 1,
                          .residual = d_residual.data(),
                          .next_norm = {nullptr, 1e-6f, true},
                          .normed = out.device()});
  out.expect(normed(left, kWidth, {}, 1e-6));
}

TEST_F(Elementwise, UpdateRowsBeyondF16AreScaledAndNotLost) {
  constexpr uint32_t kWidth = 512;
  std::vector<float> residual(kWidth, 1e-3f), weight(kWidth, 1);
  const std::vector<float> product(kWidth), one{1};
  residual[5] = 1;  // normed: about sqrt(512)
  weight[5] = 1e8f;
  const DeviceArray<float> d_product{std::span(product)},
      d_residual{std::span<const float>(residual)}, d_weight{std::span<const float>(weight)},
      d_scales{std::span(one)};
  const Rows out(1, kWidth);
  launch_update(nullptr, {.sums = {d_product.data(), 1, 1, kWidth},
                          .scales = d_scales.data(),
                          .width = kWidth,
                          .has_post_norm = false,
                          .post_norm = {},
                          .output_scale = 1,
                          .residual = d_residual.data(),
                          .next_norm = {d_weight.data(), 1e-6f, false},
                          .normed = out.device()});
  out.expect(normed({residual.begin(), residual.end()}, kWidth, weight, 1e-6));
}

TEST_F(Elementwise, NormTakesTheRowsThatItIsGiven) {
  for (const auto& [rows, width] : kShapes) {
    SCOPED_TRACE(testing::Message() << rows << " x " << width);
    const auto residual = normal(20 * size_t(width));
    std::vector<uint32_t> chosen(rows);
    for (uint32_t& row : chosen) row = random_() % 20;
    std::vector<double> x;
    for (const uint32_t row : chosen)
      x.insert(x.end(), residual.begin() + row * long(width),
               residual.begin() + (row + 1) * long(width));
    const DeviceArray<float> d_residual{std::span(residual)};
    const DeviceArray<uint32_t> d_rows{std::span<const uint32_t>(chosen)};
    const Rows out(rows, width);
    launch_norm(nullptr,
                {d_residual.data(), d_rows.data(), width, {nullptr, 1e-5f, true}, out.device()});
    out.expect(normed(x, width, {}, 1e-5));
  }
}

TEST_F(Elementwise, ValuesBeyondF16AreScaledAndNotLost) {
  constexpr uint32_t kWidth = 512;
  std::vector<float> residual(2 * kWidth, 1e-3f), weight(kWidth, 1);
  residual[5] = 1;  // normed: about sqrt(512)
  weight[5] = 1e8f;
  const std::vector<uint32_t> rows = {0, 1};
  const DeviceArray<float> d_residual{std::span<const float>(residual)},
      d_weight{std::span<const float>(weight)};
  const DeviceArray<uint32_t> d_rows{std::span(rows)};
  const Rows out(2, kWidth);
  launch_norm(
      nullptr,
      {d_residual.data(), d_rows.data(), kWidth, {d_weight.data(), 1e-6f, false}, out.device()});
  out.expect(normed({residual.begin(), residual.end()}, kWidth, weight, 1e-6));
}

TEST_F(Elementwise, GatedGelu) {
  for (const float size : {1.0f, 3e3f}) {  // values far beyond f16's range, too
    for (const auto& [rows, width] :
         {Shape{1, 21504}, {8, 512}, {3, 104}, {11, 2056}, {1, 9000}, {33, 1096}}) {
      SCOPED_TRACE(testing::Message() << rows << " x " << width << ", size " << size);
      constexpr uint32_t kParts = 2;
      const auto parts = normal(size_t(kParts) * rows * 2 * width, size);
      std::vector<float> scales(rows, 1);
      scales[0] = 2;
      const auto sum = [&](uint32_t row, uint32_t c) {
        const size_t i = size_t(row) * 2 * width + c;
        return (double(parts[i]) + parts[i + size_t(rows) * 2 * width]) * scales[row];
      };
      std::vector<double> expected;
      for (uint32_t row = 0; row < rows; ++row) {
        for (uint32_t c = 0; c < width; ++c) {
          const double x = sum(row, c);
          const double gelu =
              0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
          expected.push_back(gelu * sum(row, width + c));
        }
      }
      const DeviceArray<float> d_parts{std::span(parts)}, d_scales{std::span<const float>(scales)};
      for (const float gated_scale : {1.0f, 65536.0f}) {
        const DeviceArray<float> d_gated_scale{std::span(&gated_scale, 1)};
        const DeviceArray<uint32_t> overflow{std::vector<uint32_t>{0}};
        const Rows out(rows, width);
        launch_gated_gelu(nullptr, {{d_parts.data(), kParts, rows, 2 * width},
                                    d_scales.data(),
                                    width,
                                    d_gated_scale.data(),
                                    overflow.data(),
                                    out.device()});
        NIBBLE_CUDA(cudaDeviceSynchronize());
        const bool fits = size == 1 || gated_scale > 1;
        EXPECT_EQ(overflow.download()[0], !fits);
        if (fits) out.expect(expected, gated_scale);
      }
    }
  }
}

TEST_F(Elementwise, SumAddsPartsAndCaps) {
  for (const float softcap : {0.0f, 30.0f}) {
    constexpr uint32_t kRows = 3, kWidth = 5003, kParts = 4;
    const auto parts = normal(size_t(kParts) * kRows * kWidth, 20);
    const std::vector<float> scales = {1, 2, 1};
    const DeviceArray<float> d_parts{std::span(parts)}, d_scales{std::span(scales)},
        out(size_t{kRows} * kWidth);
    launch_sum(
        nullptr,
        {{d_parts.data(), kParts, kRows, kWidth}, d_scales.data(), kWidth, softcap, out.data()});
    NIBBLE_CUDA(cudaDeviceSynchronize());
    const auto sums = out.download();
    for (size_t i = 0; i < sums.size(); ++i) {
      double expected = 0;
      for (uint32_t p = 0; p < kParts; ++p)
        expected += double(parts[p * sums.size() + i]) * scales[i / kWidth];
      if (softcap != 0) expected = softcap * std::tanh(expected / softcap);
      ASSERT_NEAR(sums[i], expected, 4e-5) << i;
    }
  }
}

TEST_F(Elementwise, EmbedTakesRowsOfTheTable) {
  constexpr uint32_t kVocabulary = 50, kWidth = 320;
  const auto table = normal(kVocabulary * kWidth);
  std::vector<uint16_t> halves;
  for (const float value : table) halves.push_back(f32_to_f16(value));
  const DeviceArray<uint16_t> blocks{std::span<const uint16_t>(halves)};
  const DeviceArray<std::byte> tiles(TileGrid(kVocabulary, kWidth).tiles() *
                                     tile_bytes(LayoutId::kF16));
  pack_on_device(nullptr, LayoutId::kF16, blocks.data(), kVocabulary, kWidth, 0, tiles.data());
  const std::vector<int32_t> tokens = {49, 0, 17, 16, 15, 3, 2, 31, 49};
  const DeviceArray<int32_t> d_tokens{std::span(tokens)};
  const DeviceArray<float> residual(tokens.size() * kWidth);
  const Rows out(uint32_t(tokens.size()), kWidth);
  launch_embed(nullptr, {.tiles = tiles.data(),
                         .layout = LayoutId::kF16,
                         .width = kWidth,
                         .tokens = d_tokens.data(),
                         .scale = 1.5f,
                         .residual = residual.data(),
                         .norm = {nullptr, 1e-6f, true},
                         .normed = out.device()});
  NIBBLE_CUDA(cudaDeviceSynchronize());
  std::vector<double> expected;
  for (const int32_t token : tokens) {
    for (uint32_t c = 0; c < kWidth; ++c)
      expected.push_back(f16_to_f32(halves[size_t(token) * kWidth + c]) * 1.5f);
  }
  const auto rows = residual.download();
  EXPECT_TRUE(std::equal(rows.begin(), rows.end(), expected.begin(), expected.end()));
  out.expect(normed(expected, kWidth, {}, 1e-6));
}

TEST(RowWidth, RowsTooWideOrOfOddWidthAreRefused) {
  EXPECT_NO_THROW(check_row_width(kMostRowColumns, kMostRowColumns));
  EXPECT_NO_THROW(check_row_width(8, kMostRowColumns));
  EXPECT_THROW(check_row_width(12, kMostRowColumns), Error);
  EXPECT_THROW(check_row_width(kMostRowColumns + 1, kMostRowColumns), Error);
}

}  // namespace
}  // namespace nibble::cuda
