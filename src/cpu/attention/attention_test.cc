// Attention on every instruction set against its formula in doubles, and the promise that a row's
// result does not depend on what else runs.

#include "cpu/attention/attention.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "backend/kv_codec.h"

namespace nibble::cpu {
namespace {

using namespace backend;

constexpr double kUnit = 0x1p-24;

struct Storage {
  KvFormat format;
  KvLayout layout = KvLayout::kSplit;

  bool shared() const { return layout == KvLayout::kAuto; }
  // Whether it can hold heads of this size.
  bool holds(uint32_t head_dim) const {
    if (shared()) return head_dim % 32 == 0 && head_dim > 32;
    return format == KvFormat::kF32 || format == KvFormat::kF16 || head_dim % 32 == 0;
  }
};

struct Case {
  AttentionShape shape;
  uint32_t window;
  Storage storage;
};

std::string describe(const Case& c) {
  return "head_dim " + std::to_string(c.shape.head_dim) + ", " +
         std::to_string(c.shape.query_heads) + "/" + std::to_string(c.shape.kv_heads) +
         " heads, window " + std::to_string(c.window) + ", " +
         std::string(to_string(c.storage.format)) + (c.storage.shared() ? " shared" : "");
}

Plan plan_of(const Case& c) {
  Plan plan;
  plan.trained_context = 4096;
  // A layer before the one tested, so that offsets into a page count.
  for (int layer = 0; layer < 2; ++layer) {
    plan.caches.push_back({c.shape.kv_heads, c.shape.head_dim, c.window, c.storage.shared()});
  }
  plan.steps.push_back(AttendStep{{0}, {1}, c.shape, 0.4f, {1}});
  if (c.storage.shared()) {
    NormQkvStep step{};
    step.shape = c.shape;
    step.value_is_key = true;
    step.key_norm = RmsNorm{std::vector<float>(c.shape.head_dim), 0};
    for (uint32_t d = 0; d < c.shape.head_dim; ++d) {
      step.key_norm->weight[d] = float(d % 5) * 0.5f - 0.5f;  // also negative and zero
    }
    step.value_norm = RmsNorm{};
    step.rope.inverse_frequencies.assign(c.shape.head_dim / 2, 0);
    step.rope.inverse_frequencies[0] = 1;
    for (uint32_t cache : {0, 1}) {
      step.cache = {cache};
      plan.steps.push_back(step);
    }
  }
  return plan;
}

std::vector<KvGroup> groups_of(const Plan& plan, const Storage& storage) {
  const auto groups = make_kv_groups(plan, KvOptions::all(storage.format, storage.layout));
  EXPECT_EQ(groups[0].layers[1].shared.has_value(), storage.shared());
  return groups;
}

// A sequence of random keys and values. What has not been written is NaN.
class Sequence {
 public:
  Sequence(backend::HostKvStore& store, const Plan& plan, uint32_t length, std::mt19937& random)
      : store_(store),
        shape_(std::get<AttendStep>(plan.steps[0]).shape),
        key_weight_(shared_key_weight(plan, {1})),
        kv_(store) {
    kv_.prepare(length);
    std::normal_distribution<float> normal;
    const size_t width = shape_.kv_width();
    for (std::vector<float>* rows : {&keys_, &values_}) {
      rows->resize(length * width);
      for (float& x : *rows) x = normal(random);
    }
    for (PageId page : kv_.table(0)) {
      std::fill_n(store.page(0, page), store.groups()[0].page_bytes, std::byte{0xff});
    }
    for (uint32_t position = 0; position < length; ++position) write(position);
  }

  // Overwrites positions [0, end) with NaN, in the store only.
  void poison(uint32_t end) {
    for (float& x : std::span(keys_).first(end * shape_.kv_width())) x = NAN;
    for (float& x : std::span(values_).first(end * shape_.kv_width())) x = NAN;
    for (uint32_t position = 0; position < end; ++position) write(position);
  }

  const KvSequence& kv() const { return kv_; }
  const float* key(uint32_t position, uint32_t head) const {
    return keys_.data() + position * shape_.kv_width() + head * shape_.head_dim;
  }
  const float* value(uint32_t position, uint32_t head) const {
    return values_.data() + position * shape_.kv_width() + head * shape_.head_dim;
  }

 private:
  // Stores the position and keeps what the format made of it.
  void write(uint32_t position) {
    const KvLayer& layer = store_.groups()[0].layers[1];
    std::byte* page = store_.page(0, kv_.table(0)[position / kKvPageTokens]);
    const auto coded = [&](uint64_t part, uint32_t head, std::span<float> row) {
      std::byte* rows = page + part + head * layer.row.head_bytes();
      encode_kv_row(layer.row, row, rows, position % kKvPageTokens);
      decode_kv_row(layer.row, rows, position % kKvPageTokens, row);
    };
    for (uint32_t head = 0; head < shape_.kv_heads; ++head) {
      const size_t at = position * shape_.kv_width() + head * shape_.head_dim;
      const std::span key = std::span(keys_).subspan(at, shape_.head_dim);
      const std::span value = std::span(values_).subspan(at, shape_.head_dim);
      if (!layer.shared) {
        coded(layer.key_offset, head, key);
        coded(layer.value_offset, head, value);
        continue;
      }
      // The key's random numbers where it turns; elsewhere it is the weighted value.
      std::vector<float> row(layer.row.values);
      for (uint32_t d = 0; d < shape_.head_dim; ++d) {
        row[layer.shared->key_place(d)] = key[d];
        row[layer.shared->value_place(d)] = value[d];
      }
      coded(layer.key_offset, head, row);
      for (uint32_t d = 0; d < shape_.head_dim; ++d) {
        const uint32_t place = layer.shared->key_place(d);
        key[d] = row[place] * (place < layer.shared->rope_dims ? 1 : key_weight_[d]);
        value[d] = row[layer.shared->value_place(d)];
      }
    }
  }

  backend::HostKvStore& store_;
  const AttentionShape shape_;
  const std::span<const float> key_weight_;
  KvSequence kv_;
  std::vector<float> keys_, values_;  // [length, kv_width]
};

class AttentionTest : public ::testing::TestWithParam<Isa> {
 protected:
  // One token's attention by the formula, with a bound on what rounding may do to each output.
  void expect_near_formula(const Case& c, const Sequence& sequence, uint32_t position,
                           const float* query, const float* output) {
    const uint32_t head_dim = c.shape.head_dim;
    const uint32_t first = c.window == 0 || position < c.window ? 0 : position - c.window + 1;
    const uint32_t keys = position + 1 - first;
    const double scale = double(0.4f);
    // In tq4 sums run over rotated values, of which only the lengths are those of the heads, and
    // what is rotated rounds a dozen times more.
    const bool rotated = c.storage.format == KvFormat::kTq4;
    const uint32_t more_roundings = (rotated ? 12 : 0) + (c.storage.shared() ? 1 : 0);
    const auto length = [&](const float* values) {
      double squares = 0;
      for (uint32_t d = 0; d < head_dim; ++d) squares += double(values[d]) * values[d];
      return std::sqrt(squares);
    };
    for (uint32_t head = 0; head < c.shape.query_heads; ++head) {
      const uint32_t kv_head = head / (c.shape.query_heads / c.shape.kv_heads);
      std::vector<double> scores(keys);
      double highest = -INFINITY, lowest = INFINITY, score_error = 0;
      for (uint32_t k = 0; k < keys; ++k) {
        double magnitude = 0;
        for (uint32_t d = 0; d < head_dim; ++d) {
          const double product =
              double(query[head * head_dim + d]) * sequence.key(first + k, kv_head)[d];
          scores[k] += scale * product;
          magnitude += scale * std::abs(product);
        }
        if (rotated) {
          const double query_length = length(query + head * head_dim);
          magnitude = scale * query_length * length(sequence.key(first + k, kv_head));
        }
        highest = std::max(highest, scores[k]);
        lowest = std::min(lowest, scores[k]);
        // A rounding for each product and sum of a dot product, and the scale's.
        score_error =
            std::max(score_error, (2 * head_dim + 1 + more_roundings) * kUnit * magnitude);
      }
      // A weight is e^(score - maximum), off by the score's error, the difference's and the
      // exponential's (4 u), and then decays once a page and once a span, with 5 u and the
      // rounding of another difference each.
      const double steps = 2.0 * (keys / kKvPageTokens + 2);
      const double weight_error = score_error + (steps + 1) * ((highest - lowest) + 5) * kUnit;
      // Both sums have a rounding for each key and for each decay, then there is the quotient.
      const double relative =
          2 * (weight_error + (2 * keys + steps + more_roundings) * kUnit) + kUnit;
      double total = 0;
      for (double& s : scores) total += s = std::exp(s - highest);
      double mean_length = 0;
      for (uint32_t k = 0; k < keys; ++k) {
        mean_length += scores[k] / total * length(sequence.value(first + k, kv_head));
      }
      for (uint32_t d = 0; d < head_dim; ++d) {
        double exact = 0, magnitude = 0;
        for (uint32_t k = 0; k < keys; ++k) {
          const double term = scores[k] / total * sequence.value(first + k, kv_head)[d];
          exact += term;
          magnitude += std::abs(term);
        }
        if (rotated) magnitude = mean_length;
        ASSERT_NEAR(output[head * head_dim + d], exact, relative * magnitude)
            << describe(c) << ", position " << position << ", head " << head << ", dim " << d;
      }
    }
  }

  std::vector<float> random_queries(const Case& c, size_t rows) {
    std::normal_distribution<float> normal(0, 2 / std::sqrt(float(c.shape.head_dim)));
    std::vector<float> values(rows * c.shape.query_width());
    for (float& x : values) x = normal(random_);
    return values;
  }

  // Attends with rows [first, first + rows) of one sequence and checks them all.
  void check(const Case& c, uint32_t first, uint32_t rows, uint32_t threads = 2) {
    const Plan plan = plan_of(c);
    backend::HostKvStore store(groups_of(plan, c.storage), {1000});
    ThreadPool pool(threads);
    Attention attention(GetParam(), pool, plan, store);
    Sequence sequence(store, plan, first + rows, random_);
    if (c.window != 0 && first >= c.window) sequence.poison(first - c.window + 1);
    const std::vector<float> queries = random_queries(c, rows);
    std::vector<float> outputs(queries.size());
    const BatchRows batch[] = {{&sequence.kv(), 0, rows, first}};
    attention.run(std::get<AttendStep>(plan.steps[0]), batch, queries.data(), outputs.data());
    for (uint32_t row = 0; row < rows; ++row) {
      const size_t offset = size_t{row} * c.shape.query_width();
      ASSERT_NO_FATAL_FAILURE(expect_near_formula(c, sequence, first + row, queries.data() + offset,
                                                  outputs.data() + offset));
    }
  }

  const uint32_t seed_ = std::random_device()();
  std::mt19937 random_{seed_};
  const ::testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
};

INSTANTIATE_TEST_SUITE_P(, AttentionTest,
                         ::testing::ValuesIn(available_isas().begin(), available_isas().end()),
                         [](const auto& info) { return std::string(isa_name(info.param)); });

constexpr Storage kStorages[] = {
    {KvFormat::kF32},
    {KvFormat::kF16},
    {KvFormat::kQ8},
    {KvFormat::kTq4},
    {KvFormat::kF32, KvLayout::kAuto},
    {KvFormat::kF16, KvLayout::kAuto},
    {KvFormat::kQ8, KvLayout::kAuto},
    {KvFormat::kTq4, KvLayout::kAuto},
};

TEST_P(AttentionTest, HeadSizes) {
  for (uint32_t head_dim : {2, 8, 24, 40, 64, 72, 96, 128, 256, 512}) {
    for (const Storage storage : kStorages) {
      if (!storage.holds(head_dim)) continue;
      const Case c{{4, 2, head_dim}, 0, storage};
      check(c, 0, 21);
      check(c, 70, 1);
    }
  }
}

TEST_P(AttentionTest, QueryHeadsShareKvHeads) {
  for (uint32_t ratio : {1, 2, 3, 4, 5, 6, 7, 8, 33}) {
    for (const Storage storage : kStorages) {
      check({{2 * ratio, 2, 64}, 0, storage}, 0, 40);
      check({{2 * ratio, 2, 64}, 0, storage}, 45, 1, 5);
    }
  }
}

TEST_P(AttentionTest, PageAndSpanEdges) {
  const Case c{{4, 1, 32}, 0, {KvFormat::kF16}};
  for (uint32_t first : {0u, 1u, 30u, 31u, 32u, 33u, 63u, 64u, kSpanTokens - 1, kSpanTokens,
                         kSpanTokens + 1, 2 * kSpanTokens + 100}) {
    for (uint32_t rows : {1u, 2u, 35u}) check(c, first, rows, 3);
  }
}

TEST_P(AttentionTest, WindowEdges) {
  for (uint32_t window : {1u, 2u, 31u, 32u, 33u, 64u, 100u, kSpanTokens}) {
    for (const Storage storage : kStorages) {
      const Case c{{4, 2, 64}, window, storage};
      for (uint32_t first : {0u, window - 1, window, window + 1, 2 * window + 40}) {
        for (uint32_t rows : {1u, 50u}) check(c, first, rows);
      }
    }
  }
}

TEST_P(AttentionTest, ManyRows) {
  for (const Storage storage : kStorages) {
    check({{8, 2, 64}, 0, storage}, 0, 300, 4);
    check({{8, 2, 64}, 128, storage}, 200, 300, 4);
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  const Case c{{2, 1, 16}, 0, {KvFormat::kF32}};
  const Plan plan = plan_of(c);
  backend::HostKvStore store(groups_of(plan, c.storage), {10});
  ThreadPool pool(1);
  Attention attention(GetParam(), pool, plan, store);
  Sequence sequence(store, plan, 40, random_);
  std::vector<float> queries = random_queries(c, 1);
  for (float& x : queries) x *= 1e12f;  // e^score is far beyond floats: one key takes all
  std::vector<float> outputs(queries.size());
  const BatchRows batch[] = {{&sequence.kv(), 0, 1, 39}};
  attention.run(std::get<AttendStep>(plan.steps[0]), batch, queries.data(), outputs.data());
  for (uint32_t head = 0; head < 2; ++head) {
    const auto score = [&](uint32_t k) {
      double sum = 0;
      for (uint32_t d = 0; d < 16; ++d) {
        sum += double(queries[head * 16 + d]) * sequence.key(k, 0)[d];
      }
      return sum;
    };
    uint32_t best = 0;
    for (uint32_t k = 1; k < 40; ++k) best = score(k) > score(best) ? k : best;
    for (uint32_t d = 0; d < 16; ++d) {
      EXPECT_EQ(outputs[head * 16 + d], sequence.value(best, 0)[d]);
    }
  }
}

// A row's bits are the same alone, in a chunk of any size, beside other sequences and on any number
// of threads.
TEST_P(AttentionTest, RowsDoNotDependOnTheirBatch) {
  for (uint32_t window : {0u, 200u}) {
    for (const Storage storage : kStorages) {
      const Case c{{12, 2, 64}, window, storage};
      SCOPED_TRACE(describe(c));
      const Plan plan = plan_of(c);
      const AttendStep& step = std::get<AttendStep>(plan.steps[0]);
      backend::HostKvStore store(groups_of(plan, storage), {1000});
      constexpr uint32_t kFirst = 1000, kRows = 70;
      Sequence sequence(store, plan, kFirst + kRows, random_);
      Sequence other(store, plan, 600, random_);
      const size_t width = c.shape.query_width();
      const std::vector<float> queries = random_queries(c, kRows + 7);
      std::vector<float> alone(kRows * width);
      {
        ThreadPool pool(1);
        Attention attention(GetParam(), pool, plan, store);
        const BatchRows batch[] = {{&sequence.kv(), 0, kRows, kFirst}};
        attention.run(step, batch, queries.data(), alone.data());
      }
      ThreadPool pool(5);
      Attention attention(GetParam(), pool, plan, store);
      std::vector<float> outputs((kRows + 7) * width);
      for (uint32_t row = 0; row < kRows; ++row) {
        const BatchRows batch[] = {{&sequence.kv(), row, 1, kFirst + row}};
        attention.run(step, batch, queries.data(), outputs.data());
      }
      for (size_t i = 0; i < alone.size(); ++i) ASSERT_EQ(outputs[i], alone[i]) << "one by one";

      const BatchRows batch[] = {{&other.kv(), kRows, 7, 593},
                                 {&sequence.kv(), 0, 33, kFirst},
                                 {&sequence.kv(), 33, kRows - 33, kFirst + 33}};
      attention.run(step, batch, queries.data(), outputs.data());
      for (size_t i = 0; i < alone.size(); ++i) ASSERT_EQ(outputs[i], alone[i]) << "in company";
    }
  }
}

// What is stored is what the codec stores, but for values that lie as near to one number as to the
// next.
TEST_P(AttentionTest, StoredRowsAreTheCodecs) {
  for (const Storage storage : kStorages) {
    for (uint32_t head_dim : {24, 64, 96, 128, 512}) {
      if (!storage.holds(head_dim)) continue;
      const Case c{{2, 1, head_dim}, 0, storage};
      SCOPED_TRACE(describe(c));
      const Plan plan = plan_of(c);
      backend::HostKvStore store(groups_of(plan, storage), {10});
      ThreadPool pool(1);
      Attention attention(GetParam(), pool, plan, store);
      KvSequence kv(store);
      kv.prepare(40);
      const KvLayer& layer = store.groups()[0].layers[1];
      std::normal_distribution<float> normal(0, 3);
      for (uint32_t position : {0, 31, 37}) {
        std::vector<float> key(head_dim), value(head_dim);
        for (float& x : key) x = normal(random_);
        for (float& x : value) x = normal(random_);
        std::vector<float> row = key;
        if (layer.shared) {
          row.resize(layer.row.values);
          for (uint32_t d = 0; d < head_dim; ++d) row[layer.shared->key_place(d)] = key[d];
          for (uint32_t d = 0; d < head_dim; ++d) row[layer.shared->value_place(d)] = value[d];
        }
        std::vector<std::byte> expected(layer.row.head_bytes());
        encode_kv_row(layer.row, row, expected.data(), position % kKvPageTokens);
        std::vector<float> want(row.size()), got(row.size());
        decode_kv_row(layer.row, expected.data(), position % kKvPageTokens, want);
        attention.store({1}, kv, position, 0, key.data(), value.data(), 0);
        const std::byte* page = store.page(0, kv.table(0)[position / kKvPageTokens]);
        decode_kv_row(layer.row, page + layer.key_offset, position % kKvPageTokens, got);
        size_t different = 0;
        for (size_t i = 0; i < row.size(); ++i) different += std::abs(got[i] - want[i]) > 1e-5f;
        EXPECT_LE(different, layer.row.block) << "position " << position;  // a tie or a few in one
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
