#include "cuda/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/half.h"
#include "cuda/device_array.h"
#include "cuda/layouts/activation_blocks.h"
#include "cuda/test_support.h"

namespace nibble::cuda {
namespace {

using backend::kKvPageTokens;

// Tokens of one session in a step, behind those that its pages hold already.
struct Part {
  uint32_t stored, tokens;
};

struct Layer {
  backend::AttentionShape shape;
  uint32_t window;
  bool value_is_key;
};

// Row-wise double formulas, with q, k and v rounded to f16 where the device rounds them.
struct Reference {
  std::vector<double> output;     // [query_width]
  std::vector<double> tolerance;  // [query_width]
};

// A step over random numbers: what goes in, on both sides, and what must come out.
class Step {
 public:
  Step(const Layer& layer, std::vector<Part> parts, uint32_t seed)
      : layer_(layer), parts_(std::move(parts)), random_(seed), parts_of_sums_(1 + seed % 4) {
    const backend::AttentionShape& shape = layer.shape;
    const uint32_t half_page = shape.kv_width() * kKvPageTokens;  // keys or values, in f16
    // The page has another layer in front, and keys and values apart.
    key_offset_ = 2 * half_page;
    value_offset_ = key_offset_ + half_page;
    page_halves_ = value_offset_ + half_page + 64;
    make_rows();
    make_pages();
    make_sums();

    column_tiles_ = (shape.query_width() + kTileColumns - 1) / kTileColumns;
    values_ = DeviceArray<uint16_t>((places_.size() + kMostRows) * column_tiles_ * kTileColumns);
    means_ = DeviceArray<ActivationMeans>((places_.size() + kMostRows) * column_tiles_);
    split_parts_ = DeviceArray<SplitPart>(most_split_parts(test::device_shape().multiprocessors));
    NIBBLE_CUDA(cudaMemset(split_parts_.data(), 0xff, split_parts_.size() * sizeof(SplitPart)));
  }

  // What run() starts, and on pages as they were at first.
  void choose(const DeviceShape& device, MatrixUnit unit) {
    launch_ = choose_attention(device, unit, layer_.shape, uint32_t(places_.size()), single_rows_);
    workspace_ = DeviceArray<char>(attention_workspace_bytes(layer_.shape, launch_));
    device_pool_.upload(pool_);
  }

  void run(cudaStream_t stream) {
    const auto poison = [&](void* data, size_t bytes) {
      NIBBLE_CUDA(cudaMemsetAsync(data, 0xff, bytes, stream));
    };
    poison(values_.data(), values_.size() * 2);
    poison(means_.data(), means_.size() * sizeof(ActivationMeans));
    poison(workspace_.data(), workspace_.size());
    AttentionLayer layer = {};
    layer.shape = layer_.shape;
    layer.window = layer_.window;
    layer.scale = scale_;
    layer.value_is_key = layer_.value_is_key;
    layer.query_norm = {true, kEpsilon, device_query_norm_.data()};
    layer.key_norm = {true, kEpsilon, device_key_norm_.data()};
    layer.value_norm = {true, kEpsilon, nullptr};
    layer.inverse_frequencies = device_frequencies_.data();
    layer.format = backend::KvFormat::kF16;
    layer.key_offset = 2 * key_offset_;
    layer.value_offset = 2 * value_offset_;
    AttentionArgs args = {};
    args.places = device_places_.data();
    args.tables = {device_tables_.data(), table_stride_};
    args.sums = device_sums_.data();
    args.parts = parts_of_sums_;
    args.stride = stride_;
    args.workspace = workspace_.data();
    args.split_parts = split_parts_.data();
    args.output = {values_.data(), means_.data(), uint32_t(places_.size()), column_tiles_,
                   in_blocks()};
    launch_attention(stream, layer, launch_, args);
  }

  std::vector<uint16_t> output_bits() const { return values_.download(); }
  bool in_blocks() const {
    const size_t rows = places_.size();
    return rows > kMostRows || (rows > kMatrixTokens && rows % 2 == 0);
  }

  void expect_right() {
    const std::vector<uint16_t> bits = values_.download();
    const std::vector<ActivationMeans> means = means_.download();
    const std::vector<uint16_t> stored = device_pool_.download();
    if (expected_pool_.empty()) {
      expected_pool_ = pool_;
      for (uint32_t row = 0; row < places_.size(); ++row) store_row(row, expected_pool_);
      for (uint32_t row = 0; row < places_.size(); ++row) {
        for (uint32_t h = 0; h < layer_.shape.query_heads; ++h)
          references_.push_back(attend(row, h));
      }
    }
    expect_pages(stored, expected_pool_);
    for (uint32_t row = 0; row < places_.size(); ++row) expect_row(row, bits, means);
    expect_parts_unwritten();
  }

 private:
  static constexpr float kEpsilon = 1e-6f;

  float normal() { return std::normal_distribution<float>()(random_); }

  // Single rows first, in the order given.
  void make_rows() {
    std::stable_partition(parts_.begin(), parts_.end(), [](Part p) { return p.tokens == 1; });
    for (uint32_t s = 0; s < parts_.size(); ++s) {
      for (uint32_t i = 0; i < parts_[s].tokens; ++i) places_.push_back({parts_[s].stored + i, s});
      single_rows_ += parts_[s].tokens == 1;
      table_stride_ = std::max(table_stride_, page_count(s));
    }
    device_places_ = DeviceArray<RowPlace>(std::span<const RowPlace>(places_));
  }
  uint32_t page_count(uint32_t s) const {
    return (parts_[s].stored + parts_[s].tokens + kKvPageTokens - 1) / kKvPageTokens;
  }
  // The first position that any row of the sequence sees.
  uint32_t first_seen(uint32_t s) const {
    const uint32_t count = parts_[s].stored + 1;
    return layer_.window == 0 || count <= layer_.window ? 0 : count - layer_.window;
  }

  // Pages in random order, NaN where nothing is stored; those that the window has left are gone.
  void make_pages() {
    uint32_t count = 0;
    for (uint32_t s = 0; s < parts_.size(); ++s)
      count += page_count(s) - first_seen(s) / kKvPageTokens;
    std::vector<uint32_t> order(count);
    for (uint32_t i = 0; i < count; ++i) order[i] = i;
    std::shuffle(order.begin(), order.end(), random_);
    pool_.assign(size_t(count) * page_halves_, 0xffff);
    device_pool_ = DeviceArray<uint16_t>(pool_.size());
    pages_.assign(parts_.size() * table_stride_, UINT32_MAX);
    std::vector<uint64_t> addresses(pages_.size(), 1);  // no address of anything
    for (uint32_t s = 0; s < parts_.size(); ++s) {
      const uint32_t first = first_seen(s) / kKvPageTokens;
      for (uint32_t i = first; i < page_count(s); ++i) {
        const uint32_t page = pages_[s * table_stride_ + i] = order[--count];
        addresses[s * table_stride_ + i] =
            reinterpret_cast<uint64_t>(device_pool_.data() + size_t(page) * page_halves_);
      }
      for (uint32_t p = first * kKvPageTokens; p < parts_[s].stored; ++p) fill_position(s, p);
    }
    device_tables_ = DeviceArray<uint64_t>(std::span<const uint64_t>(addresses));
  }
  void fill_position(uint32_t s, uint32_t p) {
    const uint32_t first = first_seen(s);
    // A key too few or too many at the window's edge must show.
    const float size = p < first ? 1000.0f : p == first ? 30.0f : 1.0f;
    for (uint32_t head = 0; head < layer_.shape.kv_heads; ++head) {
      for (uint32_t d = 0; d < layer_.shape.head_dim; ++d) {
        pool_[place(s, p, head, key_offset_) + d] = f32_to_f16(normal());
        pool_[place(s, p, head, value_offset_) + d] = f32_to_f16(size * normal());
      }
    }
  }
  size_t place(uint32_t s, uint32_t p, uint32_t head, uint64_t offset) const {
    return pages_[s * table_stride_ + p / kKvPageTokens] * page_halves_ + offset +
           (size_t(head) * kKvPageTokens + p % kKvPageTokens) * layer_.shape.head_dim;
  }

  void make_sums() {
    const backend::AttentionShape& shape = layer_.shape;
    scale_ = 2.0f / std::sqrt(float(shape.head_dim));
    stride_ = shape.query_width() + (layer_.value_is_key ? 1 : 2) * shape.kv_width() + 8;
    sums_.resize(parts_of_sums_ * places_.size() * stride_);
    for (float& x : sums_) x = normal();
    query_norm_.resize(shape.head_dim);
    key_norm_.resize(shape.head_dim);
    for (float& x : query_norm_) x = normal();
    for (float& x : key_norm_) x = normal();
    frequencies_.resize(shape.head_dim / 2);
    for (uint32_t i = 0; i < frequencies_.size(); ++i)
      frequencies_[i] = i % 5 == 4 ? 0.0f : std::pow(1e4f, -2.0f * float(i) / shape.head_dim);
    device_sums_ = DeviceArray<float>(std::span<const float>(sums_));
    device_query_norm_ = DeviceArray<float>(std::span<const float>(query_norm_));
    device_key_norm_ = DeviceArray<float>(std::span<const float>(key_norm_));
    device_frequencies_ = DeviceArray<float>(std::span<const float>(frequencies_));
  }

  // A head after norm and, where asked for, RoPE; not rounded.
  std::vector<double> head(uint32_t row, uint32_t index, const std::vector<float>& weight,
                           bool rotated) const {
    const uint32_t dim = layer_.shape.head_dim;
    std::vector<double> x(dim);
    double squares = 0;
    for (uint32_t d = 0; d < dim; ++d) {
      for (uint32_t part = 0; part < parts_of_sums_; ++part)
        x[d] += sums_[(part * places_.size() + row) * stride_ + index * dim + d];
      squares += x[d] * x[d];
    }
    for (uint32_t d = 0; d < dim; ++d)
      x[d] *= (weight.empty() ? 1.0 : weight[d]) / std::sqrt(squares / dim + kEpsilon);
    if (!rotated) return x;
    for (uint32_t d = 0; d < dim / 2; ++d) {
      const float angle = float(places_[row].position) * frequencies_[d];
      const double c = std::cos(double(angle)), s = std::sin(double(angle));
      const double low = x[d], high = x[d + dim / 2];
      x[d] = low * c - high * s;
      x[d + dim / 2] = high * c + low * s;
    }
    return x;
  }

  void store_row(uint32_t row, std::vector<uint16_t>& pool) const {
    const backend::AttentionShape& shape = layer_.shape;
    for (uint32_t h = 0; h < shape.kv_heads; ++h) {
      const uint32_t key = shape.query_heads + h;
      const uint32_t value = layer_.value_is_key ? key : key + shape.kv_heads;
      const auto put = [&](uint64_t offset, const std::vector<double>& x) {
        const size_t at = place(places_[row].sequence, places_[row].position, h, offset);
        for (uint32_t d = 0; d < shape.head_dim; ++d) pool[at + d] = f32_to_f16(float(x[d]));
      };
      put(key_offset_, head(row, key, key_norm_, true));
      put(value_offset_, head(row, value, {}, false));
    }
  }

  // Keys and values may differ in f16's last place: f32 sums stand before that rounding. All else
  // is untouched.
  static void expect_pages(const std::vector<uint16_t>& actual,
                           const std::vector<uint16_t>& expected) {
    for (size_t i = 0; i < actual.size(); ++i) {
      if (actual[i] == expected[i]) continue;
      const float a = f16_to_f32(actual[i]), e = f16_to_f32(expected[i]);
      ASSERT_LE(std::abs(a - e), std::max(std::abs(e) * 0x1p-10f, 1e-5f)) << "at " << i;
    }
  }

  // A bound of the error: six standard deviations of a score whose q and k are rounded to f16, and
  // the roundings of a weight, a value and the result.
  Reference attend(uint32_t row, uint32_t query_head) const {
    const backend::AttentionShape& shape = layer_.shape;
    const uint32_t kv_head = query_head / (shape.query_heads / shape.kv_heads);
    const RowPlace at = places_[row];
    const std::vector<double> query = head(row, query_head, query_norm_, true);
    const uint32_t first =
        layer_.window == 0 || at.position < layer_.window ? 0 : at.position + 1 - layer_.window;
    std::vector<double> scores, errors;
    double largest = -INFINITY, sum = 0;
    for (uint32_t p = first; p <= at.position; ++p) {
      const uint16_t* key = expected_pool_.data() + place(at.sequence, p, kv_head, key_offset_);
      double score = 0, squares = 0;
      for (uint32_t d = 0; d < shape.head_dim; ++d) {
        const double product = query[d] * f16_to_f32(key[d]);
        score += product;
        squares += product * product;
      }
      scores.push_back(score * scale_);
      errors.push_back(6 / std::sqrt(3.0) * 0x1p-11 * std::sqrt(2 * squares) * scale_);
      largest = std::max(largest, scores.back());
    }
    for (double& s : scores) sum += s = std::exp(s - largest);
    Reference result{std::vector<double>(shape.head_dim), std::vector<double>(shape.head_dim)};
    for (uint32_t pass = 0; pass < 2; ++pass) {
      for (uint32_t i = 0; i < scores.size(); ++i) {
        const uint16_t* value =
            expected_pool_.data() + place(at.sequence, first + i, kv_head, value_offset_);
        for (uint32_t d = 0; d < shape.head_dim; ++d) {
          const double v = f16_to_f32(value[d]), weight = scores[i] / sum;
          if (pass == 0) {
            result.output[d] += weight * v;
          } else {
            result.tolerance[d] +=
                weight * (std::abs(v - result.output[d]) * errors[i] + std::abs(v) * 2 * 0x1p-11);
          }
        }
      }
    }
    for (uint32_t d = 0; d < shape.head_dim; ++d)
      result.tolerance[d] += std::abs(result.output[d]) * 0x1p-11 + 1e-6;
    return result;
  }

  void expect_parts_unwritten() const {
    std::vector<SplitPart> parts = split_parts_.download();
    const auto* words = reinterpret_cast<const uint32_t*>(parts.data());
    EXPECT_TRUE(std::all_of(words, words + parts.size() * sizeof(SplitPart) / 4,
                            [](uint32_t word) { return word == ~0u; }));
  }

  void expect_row(uint32_t row, const std::vector<uint16_t>& bits,
                  const std::vector<ActivationMeans>& means) const {
    const auto rows = uint32_t(places_.size());
    const uint32_t stride = activation_stride(rows);
    const uint32_t dim = layer_.shape.head_dim;
    double group_sum = 0;
    for (uint32_t h = 0; h < layer_.shape.query_heads; ++h) {
      const Reference& expected = references_[row * layer_.shape.query_heads + h];
      for (uint32_t d = 0; d < dim; ++d) {
        const uint32_t column = h * dim + d;
        const float actual =
            f16_to_f32(bits[in_blocks() ? activation_block_index(row, column, (rows + 7) / 8)
                                        : activation_index(row, column, stride)]);
        ASSERT_LE(std::abs(actual - expected.output[d]), expected.tolerance[d])
            << "row " << row << " (position " << places_[row].position << "), head " << h
            << ", dim " << d << ": " << actual << ", expected " << expected.output[d];
        group_sum += actual;
        if (in_blocks() || column % 32 != 31) continue;
        const uint32_t group = column % kTileColumns / 32;
        const auto& parts = means[column / kTileColumns * stride + row].parts;
        const double mean =
            f16_to_f32(parts[group / 2][0][group % 2]) + f16_to_f32(parts[group / 2][1][group % 2]);
        ASSERT_NEAR(mean, group_sum / 32, std::abs(group_sum / 32) * 0x1p-20 + 1e-6);
        group_sum = 0;
      }
    }
  }

  Layer layer_;
  std::vector<Part> parts_;
  std::mt19937 random_;
  uint32_t parts_of_sums_;
  AttentionLaunch launch_;
  uint32_t single_rows_ = 0, table_stride_ = 0, stride_ = 0, column_tiles_ = 0;
  uint64_t key_offset_, value_offset_, page_halves_;  // in f16
  float scale_;
  std::vector<RowPlace> places_;
  std::vector<uint32_t> pages_;  // [sequences, table_stride]
  std::vector<uint16_t> pool_, expected_pool_;
  std::vector<Reference> references_;  // [rows, query_heads]
  std::vector<float> sums_, query_norm_, key_norm_, frequencies_;
  DeviceArray<RowPlace> device_places_;
  DeviceArray<uint64_t> device_tables_;
  DeviceArray<uint16_t> device_pool_, values_;
  DeviceArray<ActivationMeans> means_;
  DeviceArray<float> device_sums_, device_query_norm_, device_key_norm_, device_frequencies_;
  DeviceArray<char> workspace_;
  DeviceArray<SplitPart> split_parts_;
};

// What prefill can be started with here: the device's own matrix unit, and the older one in all its
// shapes.
struct Kernel {
  DeviceShape device;
  MatrixUnit unit;
  std::string name;
};
std::vector<Kernel> kernels(const backend::AttentionShape& shape) {
  const DeviceShape device = test::device_shape();
  std::vector<Kernel> kernels;
  if (test::matrix_unit() == MatrixUnit::kWgmma)
    kernels.push_back({device, MatrixUnit::kWgmma, "wgmma"});
  uint32_t last = UINT32_MAX;
  for (const uint32_t bytes : {device.shared_bytes_per_block, 163u << 10, 99u << 10}) {
    const DeviceShape smaller = {device.multiprocessors,
                                 std::min(device.shared_bytes_per_block, bytes)};
    const uint32_t tile = choose_attention(smaller, MatrixUnit::kMma, shape, 2, 0).mma_tile;
    if (tile == last) continue;
    last = tile;
    kernels.push_back({smaller, MatrixUnit::kMma, "mma, tile " + std::to_string(tile)});
  }
  return kernels;
}

void expect_right(const Layer& layer, const std::vector<Part>& parts) {
  const uint32_t seed = std::random_device{}();
  std::string text =
      "seed " + std::to_string(seed) + ", heads " + std::to_string(layer.shape.query_heads) +
      " / " + std::to_string(layer.shape.kv_heads) + " of " + std::to_string(layer.shape.head_dim) +
      ", window " + std::to_string(layer.window) + ", stored + new:";
  bool prefill = false;
  for (const Part& part : parts) {
    text += " " + std::to_string(part.stored) + "+" + std::to_string(part.tokens);
    prefill = prefill || part.tokens > 1;
  }
  Step step(layer, parts, seed);
  for (const Kernel& kernel : kernels(layer.shape)) {
    SCOPED_TRACE(text + ", " + kernel.name);
    step.choose(kernel.device, kernel.unit);
    step.run(nullptr);
    NIBBLE_CUDA(cudaDeviceSynchronize());
    step.expect_right();
    if (!prefill) break;
  }
}

class Attention : public testing::TestWithParam<uint32_t> {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }
};

TEST_P(Attention, DecodesAtEveryEdge) {
  const Layer sliding{{4, 2, GetParam()}, 64, false};
  for (const uint32_t stored :
       {0u, 1u, 15u, 16u, 31u, 32u, 33u, 62u, 63u, 64u, 65u, 95u, 96u, 777u})
    expect_right(sliding, {{stored, 1}});
  const Layer full{{8, 1, GetParam()}, 0, true};
  for (const uint32_t stored : {0u, 31u, 32u, 500u, 1600u}) expect_right(full, {{stored, 1}});
}

TEST_P(Attention, WindowsOfAnySize) {
  for (const uint32_t window : {1u, 2u, 17u, 32u, 33u, 100u, 1024u}) {
    const Layer layer{{4, 2, GetParam()}, window, false};
    expect_right(layer, {{window + 40, 1}});
    expect_right(layer, {{window - 1, 1}, {window, 3}, {7, 40}});
  }
}

TEST_P(Attention, AnyRatioOfHeads) {
  for (const uint32_t ratio : {1u, 2u, 3u, 5u, 7u, 8u, 9u, 16u}) {
    const Layer layer{{2 * ratio, 2, GetParam()}, 0, true};
    expect_right(layer, {{70, 1}, {45, 1}, {33, 11}});
  }
}

TEST_P(Attention, SessionsSideBySide) {
  const Layer layer{{8, 4, GetParam()}, 128, false};
  expect_right(layer, {{0, 1}, {31, 1}, {500, 1}, {127, 1}, {128, 1}, {3, 1}, {64, 1}, {99, 1}});
  expect_right(layer, {{0, 37}});
  expect_right(layer, {{0, 5}, {31, 2}, {200, 1}, {1000, 65}, {0, 3}, {5, 1}});
}

// Chunks of a prompt: every edge of pages, tiles of keys and windows.
TEST_P(Attention, ChunksAtEveryEdge) {
  const Layer full{{4, 1, GetParam()}, 0, true}, sliding{{4, 2, GetParam()}, 100, false};
  for (const Layer& layer : {full, sliding}) {
    for (const uint32_t stored : {0u, 1u, 31u, 32u, 97u, 127u, 128u, 130u, 400u}) {
      for (const uint32_t tokens : {2u, 33u}) expect_right(layer, {{stored, tokens}});
    }
    expect_right(layer, {{0, 300}});
    expect_right(layer, {{90, 127}, {0, 129}, {257, 2}, {640, 31}});
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, Attention, testing::Values(64, 128, 256, 512),
                         testing::PrintToStringParamName());

// The shapes of the largest model.
TEST(AttentionShapes, Large) {
  NIBBLE_NEEDS_GPU();
  expect_right({{32, 16, 256}, 1024, false}, {{5000, 1}});
  expect_right({{32, 16, 256}, 1024, false}, {{1020, 9}, {5, 1}});
  expect_right({{32, 4, 512}, 0, true}, {{3000, 1}});
  expect_right({{32, 4, 512}, 0, true}, {{2000, 1}, {60, 1}, {333, 9}});
  expect_right({{32, 16, 256}, 1024, false}, {{1000, 40}});
  expect_right({{32, 4, 512}, 0, true}, {{300, 20}, {0, 20}});
}

TEST(AttentionReplay, RepeatsToTheBit) {
  NIBBLE_NEEDS_GPU();
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  Step step({{8, 2, 128}, 0, false}, {{700, 1}, {40, 1}, {11, 7}}, seed);
  step.choose(test::device_shape(), test::matrix_unit());
  step.run(nullptr);
  NIBBLE_CUDA(cudaDeviceSynchronize());
  const std::vector<uint16_t> direct = step.output_bits();

  cudaStream_t stream;
  NIBBLE_CUDA(cudaStreamCreate(&stream));
  NIBBLE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  step.run(stream);
  cudaGraph_t graph;
  NIBBLE_CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  NIBBLE_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  for (int i = 0; i < 3; ++i) {
    NIBBLE_CUDA(cudaGraphLaunch(executable, stream));
    NIBBLE_CUDA(cudaStreamSynchronize(stream));
    EXPECT_EQ(step.output_bits(), direct);
  }
  step.expect_right();
  NIBBLE_CUDA(cudaGraphExecDestroy(executable));
  NIBBLE_CUDA(cudaGraphDestroy(graph));
  NIBBLE_CUDA(cudaStreamDestroy(stream));
}

TEST(AttentionLimits, HeadsWithoutAKernelAreRefused) {
  AttentionLayer layer = {};
  layer.shape = {4, 2, 96};
  EXPECT_THROW(launch_attention(nullptr, layer, {1, 1, 1, MatrixUnit::kMma, 0}, {}), Error);
  layer.shape = {4, 2, 64};
  layer.format = backend::KvFormat::kF32;
  EXPECT_THROW(launch_attention(nullptr, layer, {1, 1, 1, MatrixUnit::kMma, 0}, {}), Error);
}

}  // namespace
}  // namespace nibble::cuda
