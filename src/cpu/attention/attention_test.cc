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

#include "base/half.h"

namespace nibble::cpu {
namespace {

using namespace backend;

constexpr double kUnit = 0x1p-24;

struct Case {
  AttentionShape shape;
  uint32_t window;
  KvFormat format;
};

std::string describe(const Case& c) {
  return "head_dim " + std::to_string(c.shape.head_dim) + ", " +
         std::to_string(c.shape.query_heads) + "/" + std::to_string(c.shape.kv_heads) +
         " heads, window " + std::to_string(c.window) + ", " + std::string(to_string(c.format));
}

Plan plan_of(const Case& c) {
  Plan plan;
  plan.trained_context = 4096;
  // A layer before the one tested, so that offsets into a page count.
  for (int layer = 0; layer < 2; ++layer) {
    plan.caches.push_back({c.shape.kv_heads, c.shape.head_dim, c.window, false});
  }
  plan.steps.push_back(AttendStep{{0}, {1}, c.shape, 0.4f, {1}});
  return plan;
}

// A sequence of random keys and values. What has not been written is NaN.
class Sequence {
 public:
  Sequence(backend::HostKvStore& store, const Plan& plan, uint32_t length, std::mt19937& random)
      : store_(store), shape_(std::get<AttendStep>(plan.steps[0]).shape), kv_(store) {
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
    const KvGroup& group = store_.groups()[0];
    std::byte* page = store_.page(0, kv_.table(0)[position / kKvPageTokens]);
    for (uint32_t i = 0; i < shape_.kv_width(); ++i) {
      const uint32_t head = i / shape_.head_dim;
      const size_t index =
          (size_t{head} * kKvPageTokens + position % kKvPageTokens) * shape_.head_dim +
          i % shape_.head_dim;
      for (bool is_key : {true, false}) {
        float& x = (is_key ? keys_ : values_)[position * shape_.kv_width() + i];
        std::byte* part =
            page + (is_key ? group.layers[1].key_offset : group.layers[1].value_offset);
        if (group.layers[1].row.format == KvFormat::kF32) {
          reinterpret_cast<float*>(part)[index] = x;
        } else {
          const uint16_t half = f32_to_f16(x);
          reinterpret_cast<uint16_t*>(part)[index] = half;
          x = f16_to_f32(half);
        }
      }
    }
  }

  backend::HostKvStore& store_;
  const AttentionShape shape_;
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
        highest = std::max(highest, scores[k]);
        lowest = std::min(lowest, scores[k]);
        // A rounding for each product and sum of a dot product, and the scale's.
        score_error = std::max(score_error, (2 * head_dim + 1) * kUnit * magnitude);
      }
      // A weight is e^(score - maximum), off by the score's error, the difference's and the
      // exponential's (4 u), and then decays once a page and once a span, with 5 u and the
      // rounding of another difference each.
      const double steps = 2.0 * (keys / kKvPageTokens + 2);
      const double weight_error = score_error + (steps + 1) * ((highest - lowest) + 5) * kUnit;
      // Both sums have a rounding for each key and for each decay, then there is the quotient.
      const double relative = 2 * (weight_error + (2 * keys + steps) * kUnit) + kUnit;
      double total = 0;
      for (double& s : scores) total += s = std::exp(s - highest);
      for (uint32_t d = 0; d < head_dim; ++d) {
        double exact = 0, magnitude = 0;
        for (uint32_t k = 0; k < keys; ++k) {
          const double term = scores[k] / total * sequence.value(first + k, kv_head)[d];
          exact += term;
          magnitude += std::abs(term);
        }
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
    backend::HostKvStore store(make_kv_groups(plan, KvOptions::all(c.format)), {1000});
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

constexpr KvFormat kFormats[] = {KvFormat::kF32, KvFormat::kF16};

TEST_P(AttentionTest, HeadSizes) {
  for (uint32_t head_dim : {2, 8, 24, 40, 64, 72, 128, 256, 512}) {
    for (KvFormat format : kFormats) {
      const Case c{{4, 2, head_dim}, 0, format};
      check(c, 0, 21);
      check(c, 70, 1);
    }
  }
}

TEST_P(AttentionTest, QueryHeadsShareKvHeads) {
  for (uint32_t ratio : {1, 2, 3, 4, 5, 6, 7, 8, 33}) {
    for (KvFormat format : kFormats) {
      check({{2 * ratio, 2, 16}, 0, format}, 0, 40);
      check({{2 * ratio, 2, 16}, 0, format}, 45, 1, 5);
    }
  }
}

TEST_P(AttentionTest, PageAndSpanEdges) {
  const Case c{{4, 1, 32}, 0, KvFormat::kF16};
  for (uint32_t first : {0u, 1u, 30u, 31u, 32u, 33u, 63u, 64u, kSpanTokens - 1, kSpanTokens,
                         kSpanTokens + 1, 2 * kSpanTokens + 100}) {
    for (uint32_t rows : {1u, 2u, 35u}) check(c, first, rows, 3);
  }
}

TEST_P(AttentionTest, WindowEdges) {
  for (uint32_t window : {1u, 2u, 31u, 32u, 33u, 64u, 100u, kSpanTokens}) {
    for (KvFormat format : kFormats) {
      const Case c{{4, 2, 16}, window, format};
      for (uint32_t first : {0u, window - 1, window, window + 1, 2 * window + 40}) {
        for (uint32_t rows : {1u, 50u}) check(c, first, rows);
      }
    }
  }
}

TEST_P(AttentionTest, ManyRows) {
  for (KvFormat format : kFormats) {
    check({{8, 2, 64}, 0, format}, 0, 300, 4);
    check({{8, 2, 64}, 128, format}, 200, 300, 4);
  }
}

TEST_P(AttentionTest, LargeScoresDoNotOverflow) {
  const Case c{{2, 1, 16}, 0, KvFormat::kF32};
  const Plan plan = plan_of(c);
  backend::HostKvStore store(make_kv_groups(plan, KvOptions::all(c.format)), {10});
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
    for (KvFormat format : kFormats) {
      const Case c{{12, 2, 64}, window, format};
      SCOPED_TRACE(describe(c));
      const Plan plan = plan_of(c);
      const AttendStep& step = std::get<AttendStep>(plan.steps[0]);
      backend::HostKvStore store(make_kv_groups(plan, KvOptions::all(format)), {1000});
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

}  // namespace
}  // namespace nibble::cpu
