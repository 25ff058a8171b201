#include "cuda/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "backend/kv_codec.h"
#include "backend/kv_tq4.h"
#include "base/error.h"
#include "base/half.h"
#include "cuda/device_array.h"
#include "cuda/layouts/activation_blocks.h"
#include "cuda/test_support.h"

namespace nibble::cuda {
namespace {

using backend::kKvPageTokens;
using backend::KvFormat;

// Tokens of one session in a step, behind those that its pages hold already.
struct Part {
  uint32_t stored, tokens;
};

struct Layer {
  backend::AttentionShape shape;
  uint32_t window;
  bool value_is_key;
};

// How keys and values are stored. With shared rows, a layer's values are its keys.
struct Storage {
  KvFormat format = KvFormat::kF16;
  bool shared = false;
};

backend::KvLayer kv_layer(const backend::AttentionShape& shape, const Storage& storage) {
  const uint32_t head_dim = shape.head_dim;
  backend::KvLayer layer = {};
  layer.kv_heads = shape.kv_heads;
  if (storage.shared) layer.shared = backend::SharedKvRow{head_dim, std::max(32u, head_dim / 4)};
  const uint32_t rope_dims = storage.shared ? layer.shared->rope_dims : 0;
  const uint32_t divisor = 1u << std::countr_zero(head_dim | rope_dims);
  layer.row = {storage.format, head_dim + rope_dims,
               storage.format == KvFormat::kF16  ? 0
               : storage.format == KvFormat::kQ8 ? 32
                                                 : std::min(divisor, 128u)};
  // The page has another layer in front.
  layer.key_offset = layer.value_offset = layer.bytes();
  if (!storage.shared) layer.value_offset += shape.kv_heads * layer.row.head_bytes();
  return layer;
}

// Row-wise double formulas over what the device has stored.
struct Reference {
  std::vector<double> output;     // [query_width]
  std::vector<double> tolerance;  // [query_width]
};

// A step over random numbers: what goes in, on both sides, and what must come out.
class Step {
 public:
  Step(const Layer& layer, const Storage& storage, std::vector<Part> parts, uint32_t seed)
      : layer_(layer),
        cache_(kv_layer(layer.shape, storage)),
        parts_(std::move(parts)),
        random_(seed),
        parts_of_sums_(1 + seed % 4),
        page_bytes_(2 * cache_.bytes() + 64) {
    const backend::AttentionShape& shape = layer.shape;
    layer_.value_is_key |= storage.shared;
    make_rows();
    make_pages();
    make_sums();

    column_tiles_ = (shape.query_width() + kTileColumns - 1) / kTileColumns;
    values_ = DeviceArray<uint16_t>((places_.size() + kMostRows) * column_tiles_ * kTileColumns);
    means_ = DeviceArray<ActivationMeans>((places_.size() + kMostRows) * column_tiles_);
    split_parts_ = DeviceArray<SplitPart>(most_split_parts(device_shape().multiprocessors));
    NIBBLE_CUDA(cudaMemset(split_parts_.data(), 0xff, split_parts_.size() * sizeof(SplitPart)));
  }

  // What run() starts, and on pages as they were at first. little_scratch: as little as will do for
  // keys in sections.
  void choose(const DeviceShape& device, MatrixUnit unit, bool little_scratch = false) {
    const KvRows rows = kv_rows(cache_, layer_.shape.head_dim);
    launch_ =
        choose_attention(device, unit, layer_.shape, rows, uint32_t(places_.size()), single_rows_);
    const auto section_pages = [&](uint64_t bytes) {
      return choose_sections(layer_.shape, rows, launch_, uint32_t(parts_.size()), chunks(),
                             most_pages_, table_stride_, bytes)
          .pages;
    };
    constexpr uint64_t kMostScratch = 1 << 30;
    const uint32_t wanted = std::min(section_pages(kMostScratch), little_scratch ? 1 : most_pages_);
    uint64_t scratch_bytes = 1 << 16;
    while (section_pages(scratch_bytes) < wanted) scratch_bytes += scratch_bytes / 8;
    scratch_ = DeviceArray<char>(scratch_bytes);
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
    poison(scratch_.data(), scratch_.size());
    AttentionLayer layer = {};
    layer.shape = layer_.shape;
    layer.window = layer_.window;
    layer.scale = scale_;
    layer.value_is_key = layer_.value_is_key;
    layer.query_norm = {true, kEpsilon, device_query_norm_.data()};
    layer.key_norm = {true, kEpsilon, device_key_norm_.data()};
    layer.value_norm = {true, kEpsilon, nullptr};
    layer.inverse_frequencies = device_frequencies_.data();
    layer.kv = kv_rows(cache_, layer_.shape.head_dim);
    AttentionArgs args = {};
    args.places = device_places_.data();
    args.sequences = device_sequences_.data();
    args.tables = {device_tables_.data(), table_stride_};
    args.sequence_count = uint32_t(parts_.size());
    args.chunks = chunks();
    args.most_pages = most_pages_;
    args.sums = device_sums_.data();
    args.parts = parts_of_sums_;
    args.stride = stride_;
    args.workspace = workspace_.data();
    args.split_parts = split_parts_.data();
    args.scratch = scratch_.data();
    args.scratch_bytes = scratch_.size();
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
    std::vector<std::byte> stored = device_pool_.download();
    if (references_.empty()) {
      stored_ = stored;
      expect_stored_rows(stored);
      make_references();
    }
    EXPECT_TRUE(stored == stored_);  // whatever kernel attends
    for (uint32_t row = 0; row < places_.size(); ++row) expect_row(row, bits, means);
    expect_parts_unwritten();
  }

 private:
  static constexpr float kEpsilon = 1e-6f;

  float normal() { return std::normal_distribution<float>()(random_); }

  // Single rows first, in the order given.
  void make_rows() {
    std::stable_partition(parts_.begin(), parts_.end(), [](Part p) { return p.tokens == 1; });
    std::vector<SequenceRows> sequences;
    for (uint32_t s = 0; s < parts_.size(); ++s) {
      for (uint32_t i = 0; i < parts_[s].tokens; ++i) places_.push_back({parts_[s].stored + i, s});
      sequences.push_back({parts_[s].tokens, parts_[s].stored, s - single_rows_});
      single_rows_ += parts_[s].tokens == 1;
      table_stride_ = std::max(table_stride_, page_count(s));
      if (parts_[s].tokens > 1)
        most_pages_ = std::max(most_pages_, page_count(s) - first_seen(s) / kKvPageTokens);
    }
    device_sequences_ = DeviceArray<SequenceRows>(std::span<const SequenceRows>(sequences));
    device_places_ = DeviceArray<RowPlace>(std::span<const RowPlace>(places_));
  }
  uint32_t chunks() const { return uint32_t(parts_.size()) - single_rows_; }
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
    pool_.assign(size_t(count) * page_bytes_, std::byte(0xff));
    device_pool_ = DeviceArray<std::byte>(pool_.size());
    pages_.assign(parts_.size() * table_stride_, UINT32_MAX);
    std::vector<uint64_t> addresses(pages_.size(), 1);  // no address of anything
    for (uint32_t s = 0; s < parts_.size(); ++s) {
      const uint32_t first = first_seen(s) / kKvPageTokens;
      for (uint32_t i = first; i < page_count(s); ++i) {
        const uint32_t page = pages_[s * table_stride_ + i] = order[--count];
        addresses[s * table_stride_ + i] =
            reinterpret_cast<uint64_t>(device_pool_.data() + size_t(page) * page_bytes_);
      }
      for (uint32_t p = first * kKvPageTokens; p < parts_[s].stored; ++p) fill_position(s, p);
    }
    device_tables_ = DeviceArray<uint64_t>(std::span<const uint64_t>(addresses));
  }
  void fill_position(uint32_t s, uint32_t p) {
    const uint32_t first = first_seen(s);
    // A key too few or too many at the window's edge must show.
    const float size = p < first ? 1000.0f : p == first && !cache_.shared ? 30.0f : 1.0f;
    std::vector<float> values(cache_.row.values);
    for (uint32_t head = 0; head < layer_.shape.kv_heads; ++head) {
      for (const bool of_value : {false, true}) {
        if (of_value && cache_.shared) continue;
        for (float& x : values) x = (of_value || cache_.shared ? size : 1.0f) * normal();
        encode_kv_row(cache_.row, values, pool_.data() + head_place(s, p, head, of_value),
                      p % kKvPageTokens);
      }
    }
  }
  // Where the head that has the position begins, in the pool.
  size_t head_place(uint32_t s, uint32_t p, uint32_t head, bool of_value) const {
    return pages_[s * table_stride_ + p / kKvPageTokens] * page_bytes_ +
           (of_value ? cache_.value_offset : cache_.key_offset) + head * cache_.row.head_bytes();
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
    const uint32_t turning = cache_.shared ? cache_.shared->rope_dims / 2 : shape.head_dim / 2;
    for (uint32_t i = 0; i < turning; ++i)
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

  // What a row of the step stores for a KV head.
  std::vector<float> row_values(uint32_t row, uint32_t kv_head, bool of_value) const {
    const backend::AttentionShape& shape = layer_.shape;
    const uint32_t key = shape.query_heads + kv_head;
    const uint32_t index = of_value && !layer_.value_is_key ? key + shape.kv_heads : key;
    const std::vector<double> as_key = head(row, index, key_norm_, true);
    const std::vector<double> as_value = head(row, index, {}, false);
    if (!cache_.shared) {
      const std::vector<double>& from = of_value ? as_value : as_key;
      return {from.begin(), from.end()};
    }
    std::vector<float> values(cache_.row.values);
    for (uint32_t d = 0; d < shape.head_dim; ++d) {
      const uint32_t place = cache_.shared->key_place(d);
      if (place < cache_.shared->rope_dims) values[place] = float(as_key[d]);
      values[cache_.shared->value_place(d)] = float(as_value[d]);
    }
    return values;
  }

  // The step's rows are in their pages as they should be, and nothing else was written.
  void expect_stored_rows(std::vector<std::byte> stored) const {
    const backend::KvRowLayout& layout = cache_.row;
    const size_t number_bytes = layout.number_bytes(), scale_bytes = 2 * layout.scales();
    for (uint32_t row = 0; row < places_.size(); ++row) {
      for (uint32_t h = 0; h < layer_.shape.kv_heads; ++h) {
        for (const bool of_value : {false, true}) {
          if (of_value && cache_.shared) continue;
          const RowPlace at = places_[row];
          const uint32_t in_page = at.position % kKvPageTokens;
          const size_t head = head_place(at.sequence, at.position, h, of_value);
          const size_t numbers = in_page * number_bytes;
          const size_t scales = layout.scales_offset() + in_page * scale_bytes;
          SCOPED_TRACE("row " + std::to_string(row) + ", head " + std::to_string(h) +
                       (of_value ? ", value" : ", key"));
          expect_stored_row(&stored[head + numbers], &stored[head + scales],
                            row_values(row, h, of_value));
          const auto restore = [&](size_t from, size_t bytes) {
            std::copy_n(pool_.begin() + from, bytes, stored.begin() + from);
          };
          restore(head + numbers, number_bytes);
          restore(head + scales, scale_bytes);
        }
      }
    }
    EXPECT_TRUE(stored == pool_);
  }

  static float load_f16(const std::byte* from) {
    uint16_t bits;
    std::memcpy(&bits, from, sizeof bits);
    return f16_to_f32(bits);
  }
  static void expect_f16(const std::byte* stored, double value, double error) {
    ASSERT_NEAR(load_f16(stored), value, std::abs(value) * 0x1p-11 + error);
  }

  // The stored row is what its format makes of these values or of others that are as near to them
  // as f32 brings sums, norm and RoPE. Whichever side of a boundary a value then falls on, and
  // whichever f16 its block's scale becomes: the numbers are those that are nearest, given the
  // scale.
  void expect_stored_row(const std::byte* numbers, const std::byte* scales,
                         std::span<const float> values) const {
    double largest = 0;
    for (const float x : values) largest = std::max(largest, std::abs(double(x)));
    const double error = 32 * 0x1p-23 * largest;  // about twice what all these steps may add up to
    const uint32_t block = cache_.row.block;
    if (block == 0) {
      for (uint32_t i = 0; i < values.size(); ++i) expect_f16(numbers + 2 * i, values[i], error);
      return;
    }
    for (uint32_t first = 0; first < values.size(); first += block) {
      SCOPED_TRACE("block at " + std::to_string(first));
      const std::span<const float> of_block = values.subspan(first, block);
      const std::byte* const scale = scales + first / block * 2;
      if (cache_.row.format == KvFormat::kQ8) {
        expect_q8(numbers + first, scale, of_block, error);
      } else {
        expect_tq4(numbers + first / 2, scale, of_block, error);
      }
    }
  }
  static void expect_q8(const std::byte* numbers, const std::byte* scale,
                        std::span<const float> values, double error) {
    double largest = 0;
    for (const float x : values) largest = std::max(largest, std::abs(double(x)));
    expect_f16(scale, largest / 127, error / 127);
    const double step = load_f16(scale);
    for (size_t i = 0; i < values.size(); ++i)
      ASSERT_NEAR(int8_t(numbers[i]) * step, values[i], step / 2 + error) << "value " << i;
  }
  static void expect_tq4(const std::byte* numbers, const std::byte* scale,
                         std::span<const float> values, double error) {
    std::vector<float> rotated(values.begin(), values.end());
    backend::tq4_rotate(rotated);
    double squares = 0, code_squares = 0;
    for (const float x : rotated) squares += double(x) * x;
    const double to_unit = std::sqrt(double(values.size()) / squares);
    const double unit_error = error * std::sqrt(double(values.size())) * to_unit;
    for (uint32_t i = 0; i < values.size(); ++i) {
      uint32_t word;
      std::memcpy(&word, numbers + i / 8 * 4, sizeof word);
      const uint32_t index = word >> backend::tq4_magnitude_shift(i % 8) & 7;
      const bool negative = (word >> backend::tq4_sign_shift(i % 8) & 1) != 0;
      const double magnitude = f16_to_f32(backend::kTq4Magnitudes[index]);
      code_squares += magnitude * magnitude;
      const double unit = (negative ? -1 : 1) * rotated[i] * to_unit;
      const double from = index == 0 ? 0 : backend::kTq4Boundaries[index - 1];
      const double to = index == 7 ? INFINITY : backend::kTq4Boundaries[index];
      ASSERT_GE(unit, from - unit_error) << "value " << i;
      ASSERT_LE(unit, to + unit_error) << "value " << i;
    }
    expect_f16(scale, std::sqrt(squares / code_squares), error);
  }

  void make_references() {
    const backend::AttentionShape& shape = layer_.shape;
    std::vector<std::vector<float>> decoded;  // [sequences, kv_heads]
    for (uint32_t s = 0; s < parts_.size(); ++s) {
      for (uint32_t h = 0; h < shape.kv_heads; ++h) decoded.push_back(decode(s, h));
    }
    for (uint32_t row = 0; row < places_.size(); ++row) {
      for (uint32_t h = 0; h < shape.query_heads; ++h) {
        const uint32_t kv_head = h / (shape.query_heads / shape.kv_heads);
        references_.push_back(
            attend(row, h, decoded[places_[row].sequence * shape.kv_heads + kv_head]));
      }
    }
  }
  // Keys and values of a head's positions from first_seen() on: [positions, 2, head_dim].
  std::vector<float> decode(uint32_t s, uint32_t kv_head) const {
    const uint32_t dim = layer_.shape.head_dim;
    std::vector<float> decoded, values(cache_.row.values);
    for (uint32_t p = first_seen(s); p < parts_[s].stored + parts_[s].tokens; ++p) {
      for (const bool of_value : {false, true}) {
        decode_kv_row(cache_.row, stored_.data() + head_place(s, p, kv_head, of_value),
                      p % kKvPageTokens, values);
        for (uint32_t d = 0; d < dim; ++d) {
          if (!cache_.shared) {
            decoded.push_back(values[d]);
            continue;
          }
          const uint32_t key_place = cache_.shared->key_place(d);
          const float weight = key_place < cache_.shared->rope_dims ? 1.0f : key_norm_[d];
          decoded.push_back(of_value ? values[cache_.shared->value_place(d)]
                                     : weight * values[key_place]);
        }
      }
    }
    return decoded;
  }

  // A bound of the error: six standard deviations of a score whose q and k are rounded to f16, and
  // the roundings of a weight, a value and the result. Where rows are rotated, roundings of their
  // values and of the result are spread evenly over the dimensions.
  Reference attend(uint32_t row, uint32_t query_head, const std::vector<float>& decoded) const {
    const uint32_t dim = layer_.shape.head_dim;
    const bool rotated = cache_.row.format == KvFormat::kTq4;
    const RowPlace at = places_[row];
    const std::vector<double> query = head(row, query_head, query_norm_, true);
    const uint32_t first =
        layer_.window == 0 || at.position < layer_.window ? 0 : at.position + 1 - layer_.window;
    const float* const rows = decoded.data() + (first - first_seen(at.sequence)) * 2 * dim;
    const auto mean_square = [&](const auto* x) {
      double squares = 0;
      for (uint32_t d = 0; d < dim; ++d) squares += double(x[d]) * x[d];
      return squares / dim;
    };
    constexpr double kSixDeviations = 6 / 1.7320508075688772 * 0x1p-11;  // of f16's rounding
    std::vector<double> scores, errors;
    double largest = -INFINITY, sum = 0;
    for (uint32_t i = 0; first + i <= at.position; ++i) {
      const float* const key = rows + i * 2 * dim;
      double score = 0, squares = 0;
      for (uint32_t d = 0; d < dim; ++d) {
        const double product = query[d] * key[d];
        score += product;
        squares += product * product;
      }
      if (rotated) squares = 2 * dim * mean_square(query.data()) * mean_square(key);
      scores.push_back(score * scale_);
      errors.push_back(kSixDeviations * std::sqrt(2 * squares) * scale_);
      largest = std::max(largest, scores.back());
    }
    for (double& s : scores) sum += s = std::exp(s - largest);
    Reference result{std::vector<double>(dim), std::vector<double>(dim)};
    for (uint32_t i = 0; i < scores.size(); ++i) {
      for (uint32_t d = 0; d < dim; ++d)
        result.output[d] += scores[i] / sum * rows[(i * 2 + 1) * dim + d];
    }
    for (uint32_t i = 0; i < scores.size(); ++i) {
      const float* const value = rows + (i * 2 + 1) * dim;
      const double spread = rotated ? kSixDeviations * std::sqrt(mean_square(value)) : 0;
      for (uint32_t d = 0; d < dim; ++d) {
        result.tolerance[d] += scores[i] / sum *
                               (std::abs(value[d] - result.output[d]) * errors[i] +
                                std::abs(value[d]) * 2 * 0x1p-11 + spread);
      }
    }
    const double spread =
        rotated ? kSixDeviations * std::sqrt(mean_square(result.output.data())) : 0;
    for (uint32_t d = 0; d < dim; ++d)
      result.tolerance[d] += std::abs(result.output[d]) * 0x1p-11 + spread + 1e-6;
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
  const backend::KvLayer cache_;
  std::vector<Part> parts_;
  std::mt19937 random_;
  uint32_t parts_of_sums_;
  AttentionLaunch launch_;
  uint32_t single_rows_ = 0, table_stride_ = 0, stride_ = 0, column_tiles_ = 0, most_pages_ = 0;
  const uint64_t page_bytes_;
  float scale_;
  std::vector<RowPlace> places_;
  std::vector<uint32_t> pages_;           // [sequences, table_stride]
  std::vector<std::byte> pool_, stored_;  // before and after the step
  std::vector<Reference> references_;     // [rows, query_heads]
  std::vector<float> sums_, query_norm_, key_norm_, frequencies_;
  DeviceArray<RowPlace> device_places_;
  DeviceArray<SequenceRows> device_sequences_;
  DeviceArray<uint64_t> device_tables_;
  DeviceArray<std::byte> device_pool_;
  DeviceArray<uint16_t> values_;
  DeviceArray<ActivationMeans> means_;
  DeviceArray<float> device_sums_, device_query_norm_, device_key_norm_, device_frequencies_;
  DeviceArray<char> workspace_, scratch_;
  DeviceArray<SplitPart> split_parts_;
};

// What prefill can be started with here: the device's own matrix unit, and the older one in all its
// shapes.
struct Kernel {
  DeviceShape device;
  MatrixUnit unit;
  std::string name;
  bool little_scratch = false;
};
std::vector<Kernel> kernels(const backend::AttentionShape& shape, const Storage& storage) {
  const DeviceShape device = device_shape();
  const KvRows rows = kv_rows(kv_layer(shape, storage), shape.head_dim);
  std::vector<Kernel> kernels;
  if (choose_attention(device, device_matrix_unit(), shape, rows, 2, 0).unit ==
      MatrixUnit::kWgmma) {
    kernels.push_back({device, MatrixUnit::kWgmma, "wgmma"});
    if (rows.block > 0) kernels.push_back({device, MatrixUnit::kWgmma, "wgmma, sections", true});
  }
  uint32_t last = UINT32_MAX;
  for (const uint32_t bytes : {device.shared_bytes_per_block, 163u << 10, 99u << 10}) {
    const DeviceShape smaller = {device.multiprocessors,
                                 std::min(device.shared_bytes_per_block, bytes)};
    const uint32_t tile = choose_attention(smaller, MatrixUnit::kMma, shape, rows, 2, 0).mma_tile;
    if (tile == last) continue;
    last = tile;
    kernels.push_back({smaller, MatrixUnit::kMma, "mma, tile " + std::to_string(tile)});
  }
  return kernels;
}

void expect_right(const Layer& layer, const Storage& storage, const std::vector<Part>& parts) {
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
  Step step(layer, storage, parts, seed);
  for (const Kernel& kernel : kernels(layer.shape, storage)) {
    SCOPED_TRACE(text + ", " + kernel.name);
    step.choose(kernel.device, kernel.unit, kernel.little_scratch);
    step.run(nullptr);
    NIBBLE_CUDA(cudaDeviceSynchronize());
    step.expect_right();
    if (!prefill) break;
  }
}

constexpr Storage kStorages[] = {{KvFormat::kF16, false}, {KvFormat::kF16, true},
                                 {KvFormat::kQ8, false},  {KvFormat::kQ8, true},
                                 {KvFormat::kTq4, false}, {KvFormat::kTq4, true}};

class Attention : public testing::TestWithParam<std::tuple<uint32_t, Storage>> {
 protected:
  void SetUp() override { NIBBLE_NEEDS_GPU(); }

  static uint32_t head_dim() { return std::get<0>(GetParam()); }
  static void expect_right(const Layer& layer, const std::vector<Part>& parts) {
    cuda::expect_right(layer, std::get<1>(GetParam()), parts);
  }
};

TEST_P(Attention, DecodesAtEveryEdge) {
  const Layer sliding{{4, 2, head_dim()}, 64, false};
  for (const uint32_t stored :
       {0u, 1u, 15u, 16u, 31u, 32u, 33u, 62u, 63u, 64u, 65u, 95u, 96u, 777u})
    expect_right(sliding, {{stored, 1}});
  const Layer full{{8, 1, head_dim()}, 0, true};
  for (const uint32_t stored : {0u, 31u, 32u, 500u, 1600u}) expect_right(full, {{stored, 1}});
}

TEST_P(Attention, WindowsOfAnySize) {
  for (const uint32_t window : {1u, 2u, 17u, 32u, 33u, 100u, 1024u}) {
    const Layer layer{{4, 2, head_dim()}, window, false};
    expect_right(layer, {{window + 40, 1}});
    expect_right(layer, {{window - 1, 1}, {window, 3}, {7, 40}});
  }
}

TEST_P(Attention, AnyRatioOfHeads) {
  for (const uint32_t ratio : {1u, 2u, 3u, 5u, 7u, 8u, 9u, 16u}) {
    const Layer layer{{2 * ratio, 2, head_dim()}, 0, true};
    expect_right(layer, {{70, 1}, {45, 1}, {33, 11}});
  }
}

TEST_P(Attention, SessionsSideBySide) {
  const Layer layer{{8, 4, head_dim()}, 128, false};
  expect_right(layer, {{0, 1}, {31, 1}, {500, 1}, {127, 1}, {128, 1}, {3, 1}, {64, 1}, {99, 1}});
  expect_right(layer, {{0, 37}});
  expect_right(layer, {{0, 5}, {31, 2}, {200, 1}, {1000, 65}, {0, 3}, {5, 1}});
  std::vector<Part> many;  // more blocks than a device has multiprocessors
  for (uint32_t i = 0; i < 40; ++i) many.push_back({13 * i, 1});
  expect_right(layer, many);
}

// Chunks of a prompt: every edge of pages, tiles of keys and windows.
TEST_P(Attention, ChunksAtEveryEdge) {
  const Layer full{{4, 1, head_dim()}, 0, true}, sliding{{4, 2, head_dim()}, 100, false};
  for (const Layer& layer : {full, sliding}) {
    for (const uint32_t stored : {0u, 1u, 31u, 32u, 97u, 127u, 128u, 130u, 400u}) {
      for (const uint32_t tokens : {2u, 33u}) expect_right(layer, {{stored, tokens}});
    }
    expect_right(layer, {{0, 300}});
    expect_right(layer, {{90, 127}, {0, 129}, {257, 2}, {640, 31}});
    expect_right(layer, {{700, 1}, {700, 68}, {0, 70}, {5, 1}});
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, Attention,
                         testing::Combine(testing::Values(64, 128, 256, 512),
                                          testing::ValuesIn(kStorages)),
                         [](const auto& info) {
                           const Storage& storage = std::get<1>(info.param);
                           return std::to_string(std::get<0>(info.param)) + "_" +
                                  std::string(to_string(storage.format)) +
                                  (storage.shared ? "_shared" : "");
                         });

// The shapes of the largest model.
TEST(AttentionShapes, Large) {
  NIBBLE_NEEDS_GPU();
  for (const Storage& storage : kStorages) {
    const Layer sliding{{32, 16, 256}, 1024, false}, full{{32, 4, 512}, 0, true};
    if (!storage.shared) {
      expect_right(sliding, storage, {{5000, 1}});
      expect_right(sliding, storage, {{1020, 9}, {5, 1}});
      expect_right(sliding, storage, {{1000, 40}});
    }
    expect_right(full, storage, {{3000, 1}});
    expect_right(full, storage, {{2000, 1}, {60, 1}, {333, 9}});
    expect_right(full, storage, {{300, 20}, {0, 20}});
  }
}

TEST(AttentionReplay, RepeatsToTheBit) {
  NIBBLE_NEEDS_GPU();
  const uint32_t seed = std::random_device{}();
  for (const Storage& storage : kStorages) {
    SCOPED_TRACE(std::to_string(seed) + ", " + std::string(to_string(storage.format)));
    Step step({{8, 2, 128}, 0, false}, storage, {{700, 1}, {40, 1}, {11, 7}}, seed);
    step.choose(device_shape(), device_matrix_unit());
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
}

TEST(AttentionLimits, HeadsWithoutAKernelAreRefused) {
  AttentionLayer layer = {};
  EXPECT_THROW(check_heads({4, 2, 96}), Error);
  EXPECT_THROW(check_heads({65, 1, 64}), Error);
  layer.shape = {4, 2, 64};
  layer.kv.format = KvFormat::kF32;
  EXPECT_THROW(launch_attention(nullptr, layer, {.rows = 1, .single_rows = 1}, {}), Error);
}

}  // namespace
}  // namespace nibble::cuda
