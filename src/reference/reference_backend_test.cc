#include "reference/reference_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/half.h"

namespace nibble::reference {
namespace {

using namespace backend;

constexpr uint32_t kVocabulary = 50, kHidden = 16, kFfn = 24, kWindow = 5, kUbatch = 64;
constexpr uint32_t kHeadDim = 64;

// A plan of two layers, one sliding and one full with K=V, over random F32 weights.
class TinyModel {
 public:
  explicit TinyModel(unsigned seed) : random_(seed) {
    plan.vocabulary = kVocabulary;
    plan.hidden = kHidden;
    plan.values = {{"residual", kHidden}, {"query", 4 * kHeadDim}, {"attended", 4 * kHeadDim}};
    const WeightId table = add_weight(kVocabulary, kHidden);
    plan.steps.push_back(EmbedStep{table, std::sqrt(float(kHidden)), residual});
    add_layer(kWindow, false);
    add_layer(0, true);
    plan.steps.push_back(LogitsStep{residual, norm(kHidden), table, 30.0f});
  }

  const ValueId residual{0}, query{1}, attended{2};
  Plan plan;

 private:
  std::vector<float> random_values(size_t count, float deviation) {
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> values(count);
    for (float& x : values) x = normal(random_);
    return values;
  }
  WeightId add_weight(uint32_t rows, uint32_t columns) {
    weights_.push_back(random_values(size_t{rows} * columns, 1 / std::sqrt(float(columns))));
    plan.weights.push_back(
        {columns,
         {{"w", quant::QuantType::kF32, rows, std::as_bytes(std::span(weights_.back()))}}});
    return {uint32_t(plan.weights.size() - 1)};
  }
  RmsNorm norm(uint32_t width) { return {random_values(width, 1), 1e-6f}; }

  void add_layer(uint32_t window, bool value_is_key) {
    const AttentionShape shape{.query_heads = 4, .kv_heads = 2, .head_dim = kHeadDim};
    plan.caches.push_back({shape.kv_heads, shape.head_dim, window, value_is_key});
    const KvId cache{uint32_t(plan.caches.size() - 1)};
    const uint32_t rows = shape.query_width() + (value_is_key ? 1 : 2) * shape.kv_width();
    Rope rope{std::vector<float>(kHeadDim / 2, 0.0f)};  // three pairs turn
    std::ranges::copy(std::array{1.0f, 0.1f, 0.01f}, rope.inverse_frequencies.begin());
    plan.steps.push_back(NormQkvStep{.input = residual,
                                     .norm = norm(kHidden),
                                     .qkv = add_weight(rows, kHidden),
                                     .shape = shape,
                                     .value_is_key = value_is_key,
                                     .query_norm = norm(kHeadDim),
                                     .key_norm = norm(kHeadDim),
                                     .value_norm = RmsNorm{{}, 1e-6f},
                                     .rope = rope,
                                     .cache = cache,
                                     .query = query});
    plan.steps.push_back(AttendStep{query, cache, shape, 1.0f, attended});
    plan.steps.push_back(
        ProjectStep{attended, add_weight(kHidden, 4 * kHeadDim), norm(kHidden), 1.0f, residual});
    plan.steps.push_back(GatedMlpStep{.residual = residual,
                                      .norm = norm(kHidden),
                                      .gate_up = add_weight(2 * kFfn, kHidden),
                                      .activation = Activation::kGeluTanh,
                                      .down = add_weight(kHidden, kFfn),
                                      .post_norm = norm(kHidden),
                                      .output_scale = 0.75f});
  }

  std::mt19937 random_;
  std::vector<std::vector<float>> weights_;
};

class ReferenceTest : public testing::Test {
 protected:
  std::unique_ptr<Backend> make(const KvOptions& kv) {
    return make_reference_backend(
        model_.plan, {.kv = kv, .ubatch = kUbatch, .threads = 2, .max_kv_pages = {20, 20}});
  }
  std::vector<TokenId> random_tokens(size_t count) {
    std::uniform_int_distribution<int32_t> id(0, kVocabulary - 1);
    std::vector<TokenId> tokens(count);
    for (TokenId& token : tokens) token = {id(random_)};
    return tokens;
  }
  // Logits of all `tokens`.
  static std::vector<float> extend(Backend& backend, KvSequence& sequence,
                                   std::span<const TokenId> tokens) {
    const BatchSequence part{tokens, &sequence, uint32_t(tokens.size()), {}};
    BatchResult result;
    sequence.prepare(uint32_t(tokens.size()));
    backend.run({.sequences = std::span(&part, 1), .stop = {}, .observe = {}}, result);
    sequence.commit(uint32_t(tokens.size()));
    return result.logits;
  }

  const unsigned seed_ = std::random_device()();
  testing::ScopedTrace trace_{__FILE__, __LINE__, "seed " + std::to_string(seed_)};
  std::mt19937 random_{seed_};
  TinyModel model_{seed_};
};

// The K=V layer's row computes what two rows do, but for where it rounds: 2^-24 of scores of some
// hundreds, in which logits up to 30 are some e-folds.
TEST_F(ReferenceTest, SharedRowsChangeNothing) {
  const auto tokens = random_tokens(kUbatch);
  const auto split = make(KvOptions::all(KvFormat::kF32, KvLayout::kSplit));
  const auto shared = make(KvOptions::all(KvFormat::kF32, KvLayout::kAuto));
  KvSequence in_split(split->kv()), in_shared(shared->kv());
  const std::vector<float> expected = extend(*split, in_split, tokens);
  const std::vector<float> logits = extend(*shared, in_shared, tokens);
  EXPECT_LT(shared->memory().kv_bytes, split->memory().kv_bytes);
  for (size_t i = 0; i < logits.size(); ++i) ASSERT_NEAR(logits[i], expected[i], 1e-3) << i;
}

class ReferenceBackendTest : public ReferenceTest, public testing::WithParamInterface<KvOptions> {
 protected:
  std::unique_ptr<Backend> make() { return ReferenceTest::make(GetParam()); }
};

TEST_P(ReferenceBackendTest, OneTokenAtATimeEqualsAllAtOnce) {
  const auto backend = make();
  const auto tokens = random_tokens(kUbatch);  // two pages
  KvSequence whole(backend->kv()), stepwise(backend->kv());
  const std::vector<float> expected = extend(*backend, whole, tokens);
  std::vector<float> actual;
  for (const TokenId& token : tokens) {
    const auto row = extend(*backend, stepwise, std::span(&token, 1));
    actual.insert(actual.end(), row.begin(), row.end());
  }
  EXPECT_EQ(actual, expected);
}

TEST_P(ReferenceBackendTest, SequencesOfABatchAreIsolated) {
  const auto backend = make();
  const auto a = random_tokens(9), b = random_tokens(1), c = random_tokens(20);
  std::vector<float> expected;
  std::vector<KvSequence> sequences;
  std::vector<BatchSequence> parts;
  sequences.reserve(3);
  for (const auto& tokens : {std::span(a), std::span(b), std::span(c)}) {
    KvSequence alone(backend->kv());
    const auto logits = extend(*backend, alone, tokens);
    expected.insert(expected.end(), logits.end() - kVocabulary, logits.end());
    sequences.emplace_back(backend->kv()).prepare(uint32_t(tokens.size()));
    parts.push_back({tokens, &sequences.back(), 1, {}});
  }
  BatchResult result;
  backend->run({.sequences = parts, .stop = {}, .observe = {}}, result);
  EXPECT_EQ(result.logits, expected);
}

TEST_P(ReferenceBackendTest, SlidingLayerForgetsWhatItsWindowHasPassed) {
  // Only the sliding layer: the first layer's steps and the logits.
  model_.plan.steps.erase(model_.plan.steps.begin() + 5, model_.plan.steps.end() - 1);
  const auto backend = make();
  auto tokens = random_tokens(40);
  KvSequence first(backend->kv()), second(backend->kv());
  const auto logits = extend(*backend, first, tokens);
  tokens[10].value = (tokens[10].value + 1) % int32_t{kVocabulary};
  const auto changed = extend(*backend, second, tokens);
  for (size_t position = 0; position < tokens.size(); ++position) {
    const auto at = ptrdiff_t(position * kVocabulary);
    const bool same =
        std::equal(logits.begin() + at, logits.begin() + at + kVocabulary, changed.begin() + at);
    EXPECT_EQ(same, position < 10 || position >= 10 + kWindow) << position;
  }
}

TEST_P(ReferenceBackendTest, StepsFollowTheirFormulas) {
  const auto backend = make();
  const auto tokens = random_tokens(1);
  std::map<size_t, std::vector<float>> written;
  KvSequence sequence(backend->kv());
  sequence.prepare(1);
  const BatchSequence part{tokens, &sequence, 0, {}};
  BatchResult result;
  backend->run({.sequences = std::span(&part, 1),
                .stop = {},
                .observe =
                    [&](size_t step, ValueId value, std::span<const float> rows) {
                      EXPECT_EQ(rows.size(), model_.plan.value(value).width);
                      written[step].assign(rows.begin(), rows.end());
                    }},
               result);
  EXPECT_TRUE(result.logits.empty());
  ASSERT_EQ(written.size(), model_.plan.steps.size() - 1);  // all but the logits

  const auto weight = [&](WeightId id) {
    return reinterpret_cast<const float*>(model_.plan.weight(id).segments[0].data.data());
  };
  const auto multiply = [&](WeightId id, const std::vector<double>& x) {
    std::vector<double> y(model_.plan.weight(id).rows(), 0.0);
    for (size_t r = 0; r < y.size(); ++r) {
      for (size_t c = 0; c < x.size(); ++c) y[r] += double{weight(id)[r * x.size() + c]} * x[c];
    }
    return y;
  };
  const auto normed = [](const RmsNorm& norm, std::vector<double> x) {
    double mean_square = 0;
    for (double value : x) mean_square += value * value / double(x.size());
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] *= (norm.weight.empty() ? 1.0 : norm.weight[i]) / std::sqrt(mean_square + norm.epsilon);
    }
    return x;
  };
  const auto expect_near = [&](size_t step, const std::vector<double>& expected, double epsilon) {
    SCOPED_TRACE(step);
    double norm = 0;
    for (double x : expected) norm = std::max(norm, std::abs(x));
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_NEAR(written[step][i], expected[i], epsilon * norm) << "at " << i;
    }
  };
  // Every stage of a step rounds to float once; norms over few values and products of random signs
  // carry that on with a modest factor.
  constexpr double kFloat = 100 * 0x1p-24;

  const auto& embed = std::get<EmbedStep>(model_.plan.steps[0]);
  std::vector<double> x(kHidden);
  for (size_t i = 0; i < kHidden; ++i) {
    x[i] = double{weight(embed.table)[size_t(tokens[0].value) * kHidden + i]} * embed.scale;
  }
  expect_near(0, x, kFloat);

  // At position 0 nothing turns, and a head attends to its own value only.
  const auto& qkv = std::get<NormQkvStep>(model_.plan.steps[1]);
  const auto product = multiply(qkv.qkv, normed(qkv.norm, x));
  std::vector<double> query, attended;
  for (int head = 0; head < 4; ++head) {
    const auto q =
        normed(*qkv.query_norm, {&product[head * kHeadDim], &product[(head + 1) * kHeadDim]});
    query.insert(query.end(), q.begin(), q.end());
    const double* value = &product[(4 + 2 + head / 2) * kHeadDim];
    const auto v = normed(*qkv.value_norm, {value, value + kHeadDim});
    attended.insert(attended.end(), v.begin(), v.end());
  }
  expect_near(1, query, kFloat);
  // What a format may do to the largest values; q8's scale has its own rounding.
  const double kv_epsilons[] = {kFloat, 0x1p-11, 0.5 / 127 + 0x1p-10, 0.5};
  const double kv_epsilon = kv_epsilons[size_t(GetParam().window_format)];
  expect_near(2, attended, kv_epsilon);

  // From here on with the rows as they were written, so that errors don't add up over steps.
  const auto& project = std::get<ProjectStep>(model_.plan.steps[3]);
  const auto projected =
      normed(*project.post_norm, multiply(project.weight, {written[2].begin(), written[2].end()}));
  for (size_t i = 0; i < kHidden; ++i) x[i] += projected[i];
  expect_near(3, x, kFloat);

  x.assign(written[3].begin(), written[3].end());
  const auto& mlp = std::get<GatedMlpStep>(model_.plan.steps[4]);
  const auto gate_up = multiply(mlp.gate_up, normed(mlp.norm, x));
  std::vector<double> gated(kFfn);
  for (size_t i = 0; i < kFfn; ++i) {
    const double g = gate_up[i];
    gated[i] = g / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) *
               gate_up[kFfn + i];
  }
  const auto down = normed(*mlp.post_norm, multiply(mlp.down, gated));
  for (size_t i = 0; i < kHidden; ++i) x[i] = (x[i] + down[i]) * 0.75;
  expect_near(4, x, kFloat);
}

TEST_P(ReferenceBackendTest, LogitRowsAndSamplesAreThoseAskedFor) {
  const auto backend = make();
  const auto tokens = random_tokens(6);
  KvSequence alone(backend->kv());
  const auto all = extend(*backend, alone, tokens);

  KvSequence a(backend->kv()), b(backend->kv());
  a.prepare(6);
  b.prepare(6);
  SamplingParams greedy;
  greedy.temperature = 0;
  const BatchSequence parts[] = {{tokens, &a, 2, {}},
                                 {tokens, &b, 0, SampleRequest{&greedy, 6, {}}}};
  BatchResult result;
  backend->run({.sequences = parts, .stop = {}, .observe = {}}, result);
  EXPECT_EQ(result.logits, std::vector<float>(all.end() - 2 * kVocabulary, all.end()));
  const auto last = all.end() - kVocabulary;
  const TokenId best{int32_t(std::max_element(last, all.end()) - last)};
  EXPECT_EQ(result.sampled, std::vector<TokenId>{best});
}

TEST_P(ReferenceBackendTest, StopCancelsBetweenStepsAndTheSequenceGoesOn) {
  const auto backend = make();
  const auto tokens = random_tokens(6);
  KvSequence fresh(backend->kv()), stopped(backend->kv());
  const auto expected = extend(*backend, fresh, tokens);

  stopped.prepare(6);
  const BatchSequence part{tokens, &stopped, 6, {}};
  BatchResult result;
  int asked = 0;
  const Batch batch{
      .sequences = std::span(&part, 1), .stop = [&] { return ++asked == 3; }, .observe = {}};
  try {
    backend->run(batch, result);
    FAIL() << "not cancelled";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCancelled);
  }
  EXPECT_EQ(extend(*backend, stopped, tokens), expected);
}

TEST_P(ReferenceBackendTest, MemoryCountsPagesInTheirFormat) {
  const auto backend = make();
  KvSequence sequence(backend->kv());
  extend(*backend, sequence, random_tokens(33));
  // Two layers of two pages of 32 positions and 2 heads.
  const double value_bytes[] = {4, 2, 1 + 2.0 / 32, 0.5 + 2.0 / 64};
  const double shared_value_bytes[] = {4, 2, 1 + 2.0 / 32, 0.5 + 2.0 / 32};
  const double sliding = 2 * kHeadDim * value_bytes[size_t(GetParam().window_format)];
  const double full = GetParam().layout == KvLayout::kSplit
                          ? 2 * kHeadDim * value_bytes[size_t(GetParam().format)]
                          : (kHeadDim + 32) * shared_value_bytes[size_t(GetParam().format)];
  EXPECT_EQ(backend->memory().kv_bytes, 2 * 32 * 2 * (sliding + full));
  EXPECT_EQ(backend->memory().weights_bytes, model_.plan.weight_bytes());
  EXPECT_GT(backend->memory().workspace_bytes, 0u);
}

INSTANTIATE_TEST_SUITE_P(
    Kv, ReferenceBackendTest,
    testing::Values(KvOptions::all(KvFormat::kF32), KvOptions::all(KvFormat::kF16),
                    KvOptions::all(KvFormat::kQ8), KvOptions::all(KvFormat::kTq4),
                    KvOptions::all(KvFormat::kF32, KvLayout::kAuto),
                    KvOptions::all(KvFormat::kF16, KvLayout::kAuto),
                    KvOptions::all(KvFormat::kQ8, KvLayout::kAuto),
                    KvOptions::all(KvFormat::kTq4, KvLayout::kAuto)),
    [](const auto& info) {
      const bool split = info.param.layout == KvLayout::kSplit;
      return std::string(to_string(info.param.format)) + (split ? "_split" : "_shared");
    });

}  // namespace
}  // namespace nibble::reference
