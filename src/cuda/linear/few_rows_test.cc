#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/checked_math.h"
#include "base/half.h"
#include "cuda/device_array.h"
#include "cuda/layouts/pack.h"
#include "cuda/linear/launch_few_rows.h"
#include "cuda/test_support.h"
#include "quant/quant_type.h"

namespace nibble::cuda {
namespace {

using backend::WeightStorage;

// Random blocks with scales of a trained file's size: values of about 0.05.
std::vector<std::byte> random_blocks(LayoutId id, uint32_t rows, uint32_t columns,
                                     std::mt19937& random) {
  std::vector<std::byte> bytes;
  visit_layout(id, [&](auto layout) {
    using Block = typename decltype(layout)::type::Block;
    std::vector<Block> blocks(size_t(rows) * columns / Block::kValues);
    for (std::byte& byte : std::as_writable_bytes(std::span(blocks))) byte = std::byte(random());
    const auto set = [&](uint8_t* to, float size) {
      const uint16_t bits = f32_to_f16(std::uniform_real_distribution<float>(0, size)(random));
      to[0] = uint8_t(bits);
      to[1] = uint8_t(bits >> 8);
    };
    for (Block& block : blocks) {
      if constexpr (requires { block.min_scale; }) {
        set(block.scale.bytes, 1e-4f);
        set(block.min_scale.bytes, 1e-3f);
      } else if constexpr (requires { block.scale; }) {
        set(block.scale.bytes, sizeof(Block) == sizeof(quant::BlockQ6K) ? 3e-5f : 3e-3f);
      } else {
        block.bytes[1] = (block.bytes[1] & 0x80) | 0x2a;  // f16: about 0.05, bf16: about 1e-13
        if (id == LayoutId::kBf16) block.bytes[1] = (block.bytes[1] & 0x80) | 0x3d;
      }
    }
    const auto raw = std::as_bytes(std::span(blocks));
    bytes.assign(raw.begin(), raw.end());
  });
  return bytes;
}

struct Segment {
  LayoutId layout;
  uint32_t rows;
};

// What activations.h stores of `values` [rows, columns], which become what f16 makes of them.
struct HostActivations {
  std::vector<uint16_t> values;
  std::vector<ActivationMeans> means;

  HostActivations(std::vector<float>& floats, uint32_t rows, uint32_t columns) {
    const uint32_t column_tiles = TileGrid(1, columns).column_tiles;
    const uint32_t stride = activation_stride(rows);
    values.resize(size_t(stride) * column_tiles * kTileColumns);
    means.resize(size_t(stride) * column_tiles);
    // Rows beyond the last one: NaN.
    std::ranges::fill(values, uint16_t{0x7e00});
    std::memset(means.data(), 0x7e, means.size() * sizeof(ActivationMeans));
    for (uint32_t row = 0; row < rows; ++row) {
      std::vector<float> sums(column_tiles * 8);
      for (uint32_t column = columns; column < column_tiles * kTileColumns; ++column)
        values[activation_index(row, column, stride)] = 0;
      for (uint32_t column = 0; column < columns; ++column) {
        float& value = floats[size_t(row) * columns + column];
        const uint16_t bits = f32_to_f16(value);
        values[activation_index(row, column, stride)] = bits;
        sums[column / 32] += value = f16_to_f32(bits);
      }
      for (uint32_t group = 0; group < sums.size(); ++group) {
        const float mean = sums[group] / 32;
        auto& parts = means[size_t(group / 8) * stride + row].parts[group % 8 / 2];
        parts[0][group % 2] = f32_to_f16(mean);
        parts[1][group % 2] = f32_to_f16(mean - f16_to_f32(parts[0][group % 2]));
      }
    }
  }
};

void expect_product(std::vector<Segment> segments, uint32_t columns, uint32_t rows) {
  const uint32_t seed = std::random_device{}();
  std::mt19937 random(seed);
  SCOPED_TRACE(testing::Message() << "columns " << columns << ", rows " << rows << ", seed "
                                  << seed);
  std::vector<float> x(size_t(rows) * columns);
  std::normal_distribution<float> normal;
  for (float& value : x) value = normal(random);
  const HostActivations host(x, rows, columns);
  const DeviceArray<uint16_t> values(host.values);
  const DeviceArray<ActivationMeans> means(host.means);

  const bool two = segments.size() == 2;
  const auto second = two ? std::optional(segments[1].layout) : std::nullopt;
  FewRowsArgs args = {};
  args.column_tiles = TileGrid(1, columns).column_tiles;
  args.rows = rows;
  args.activations = values.data();
  args.means = means.data();
  args.output_stride = segments[0].rows + (two ? segments[1].rows : 0);
  std::vector<std::vector<std::byte>> blocks;
  std::vector<DeviceArray<std::byte>> raw, packed;
  for (const Segment& segment : segments) {
    blocks.push_back(random_blocks(segment.layout, segment.rows, columns, random));
    std::vector<std::byte> padded = blocks.back();
    padded.resize(round_up(padded.size(), size_t{16}));
    raw.emplace_back(std::span<const std::byte>(padded));
    packed.emplace_back(TileGrid(segment.rows, columns).tiles() * tile_bytes(segment.layout));
    pack_on_device(nullptr, segment.layout, raw.back().data(), segment.rows, columns, 0,
                   packed.back().data());
  }
  NIBBLE_CUDA(cudaDeviceSynchronize());
  const auto launch_for = [&](WeightStorage storage) {
    return choose_few_rows(device_shape(), segments[0].layout, segments[0].rows, second,
                           two ? segments[1].rows : 0, columns, rows, storage);
  };
  const auto parts_of = [&](WeightStorage storage) {
    const FewRowsLaunch launch = launch_for(storage);
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      args.weights[i] = {packed[i].data(), segment.rows, i ? segments[0].rows : 0};
      if (storage == WeightStorage::kPacked) continue;
      args.weights[i].data = raw[i].data();
      args.weights[i].row_bytes = blocks[i].size() / segment.rows;
    }
    DeviceArray<float> output(size_t(launch.parts) * rows * args.output_stride);
    NIBBLE_CUDA(cudaMemset(output.data(), 0xff, output.size() * 4));  // NaN: nothing written
    args.output = output.data();
    launch_few_rows(nullptr, segments[0].layout, second, args, launch);
    NIBBLE_CUDA(cudaDeviceSynchronize());
    return output.download();
  };
  const auto expect_right = [&](const std::vector<float>& parts) {
    const uint32_t count = uint32_t(parts.size() / rows / args.output_stride);
    for (size_t i = 0; i < segments.size(); ++i) {
      const Segment& segment = segments[i];
      // Weights may be rounded to 11 bits; f32 sums of `columns` products add little to that.
      const double tolerance = std::exp2(-11) + columns * std::exp2(-24);
      quant::QuantType type{};
      visit_layout(segment.layout, [&](auto layout) { type = decltype(layout)::type::kSource; });
      const auto& traits = quant::quant_traits(type);
      const size_t row_bytes = quant::row_bytes(type, columns);
      std::vector<float> weights(columns);
      for (uint32_t n = 0; n < segment.rows; ++n) {
        traits.dequantize(std::span(blocks[i]).subspan(n * row_bytes, row_bytes), weights);
        for (uint32_t row = 0; row < rows; ++row) {
          double expected = 0, magnitude = 0, actual = 0;
          for (uint32_t k = 0; k < columns; ++k) {
            const double product = double(weights[k]) * x[size_t(row) * columns + k];
            expected += product;
            magnitude += std::abs(product);
          }
          for (uint32_t part = 0; part < count; ++part)
            actual += parts[(size_t(part) * rows + row) * args.output_stride +
                            args.weights[i].first_output + n];
          ASSERT_LE(std::abs(actual - expected), tolerance * magnitude)
              << "segment " << i << ", output " << n << ", row " << row;
        }
      }
    }
  };
  const std::vector<float> from_tiles = parts_of(WeightStorage::kPacked);
  expect_right(from_tiles);
  if (rows > kMatrixTokens) return;
  // The same additions, unless blocks leave less room for activations.
  const std::vector<float> from_blocks = parts_of(WeightStorage::kDirect);
  if (from_blocks.size() != from_tiles.size()) return expect_right(from_blocks);
  EXPECT_TRUE(from_blocks == from_tiles);
}

constexpr LayoutId kAll[] = {LayoutId::kQ4,          LayoutId::kQ5,  LayoutId::kQ6,  LayoutId::kQ8,
                             LayoutId::kQ4Symmetric, LayoutId::kF16, LayoutId::kBf16};

TEST(FewRows, EqualsTheProductInEveryLayoutAndNumberOfRows) {
  NIBBLE_NEEDS_GPU();
  for (const LayoutId layout : kAll) {
    SCOPED_TRACE(testing::Message() << "layout " << int(layout));
    for (const uint32_t rows : {1u, 2u, 3u, 5u, 8u, 9u, 16u, 17u, 32u})
      expect_product({{layout, 333}}, 768, rows);
  }
}

TEST(FewRows, TakesMatricesOfAllShapes) {
  NIBBLE_NEEDS_GPU();
  expect_product({{LayoutId::kQ4, 1}}, 256, 1);
  expect_product({{LayoutId::kQ4, 17}}, 512, 8);
  expect_product({{LayoutId::kQ4, 5376}}, 2048, 1);
  expect_product({{LayoutId::kQ6, 2200}}, 5376, 3);
  expect_product({{LayoutId::kQ8, 100}}, 288, 2);  // columns that end within a tile
  expect_product({{LayoutId::kF16, 40}}, 77, 1);
  expect_product({{LayoutId::kQ4, 700}}, 21504, 8);   // more activations than shared memory
  expect_product({{LayoutId::kQ6, 20000}}, 1024, 1);  // wide blocks
  expect_product({{LayoutId::kQ4, 17}}, 21504, 13);   // fewer rows than warps, many chunks
  expect_product({{LayoutId::kQ6, 1}}, 256, 30);
  expect_product({{LayoutId::kQ5, 5376}}, 2048, 20);
  expect_product({{LayoutId::kF16, 50}}, 77, 32);
}

TEST(FewRows, TakesTwoLayoutsInOneKernel) {
  NIBBLE_NEEDS_GPU();
  for (const uint32_t rows : {1u, 8u, 11u, 29u}) {
    expect_product({{LayoutId::kQ4, 12288}, {LayoutId::kQ6, 4096}}, 512, rows);
    expect_product({{LayoutId::kQ5, 96}, {LayoutId::kQ6, 48}}, 1536, rows);
  }
}

}  // namespace
}  // namespace nibble::cuda
