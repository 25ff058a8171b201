// The CUDA backend as a whole: against the reference on real weights; its graphs against direct
// launches; sessions side by side.

#ifdef NIBBLE_HAS_CUDA

#include "cuda/cuda_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cctype>
#include <cstring>
#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "base/half.h"
#include "conformance/real_model.h"
#include "quant/q4_0.h"
#include "reference/reference_backend.h"
#include "support/small_gemma4.h"

namespace nibble {
namespace {

using namespace backend;
using namespace conformance;

class CudaBackendTest : public testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    if (cuda::device_count() == 0) GTEST_SKIP() << "this machine has no CUDA device";
    backend_ = make(true);
  }
  std::unique_ptr<Backend> make(bool graphs, WeightStorage weights = WeightStorage::kPacked) const {
    BackendOptions options = model_.options(KvFormat::kF16);
    options.graphs = graphs;
    options.weights = weights;
    return cuda::make_cuda_backend(model_.plan, options, {});
  }

  const RealModel model_{GetParam()};
  std::unique_ptr<Backend> backend_;
  std::span<const TokenId> tokens_ = std::span<const TokenId>(model_.tokens).first(560);
};

std::string file_name(const testing::TestParamInfo<const char*>& info) {
  std::string name = info.param;
  std::ranges::replace_if(
      name, [](char c) { return !std::isalnum(c); }, '_');
  return name;
}

INSTANTIATE_TEST_SUITE_P(, CudaBackendTest,
                         testing::Values("micro-gemma4-f16.gguf", "micro-gemma4-Q8_0.gguf",
                                         "micro-gemma4-Q6_K.gguf", "micro-gemma4-Q5_K_M.gguf",
                                         "micro-gemma4-Q4_K_M.gguf", "micro-gemma4-Q4_0.gguf",
                                         "wide-gemma4-Q4_K_M.gguf"),
                         file_name);

// One token after another, each drawn from the one before.
std::vector<TokenId> decode(Backend& backend, KvSequence& kv, TokenId token, size_t count,
                            const SamplingParams& params) {
  std::vector<TokenId> drawn;
  while (drawn.size() < count) {
    kv.prepare(1);
    const SampleRequest request{&params, kv.length() + 1, {&token, 1}};
    const BatchSequence sequence{{&token, 1}, &kv, 0, request};
    BatchResult result;
    backend.run({.sequences = std::span(&sequence, 1), .stop = {}, .observe = {}}, result);
    kv.commit(1);
    token = result.sampled.at(0);
    drawn.push_back(token);
  }
  return drawn;
}

SamplingParams greedy() {
  SamplingParams params;
  params.temperature = 0;
  return params;
}

// Activations and weights as f16 round by 2^-12 (half a unit) of their size, independently, in
// each of the 25 matrices on the way; keys and values as in the CPU's test.
constexpr double kHalves = 2 * 5 * 0x1p-11;

TEST_P(CudaBackendTest, LogitsAreTheReferences) {
  const std::span tokens = tokens_.first(200);  // past the window of 128
  const auto reference =
      reference::make_reference_backend(model_.plan, model_.options(KvFormat::kF16));
  const std::vector<float> expected = prefill_fresh(*reference, tokens, kUbatch);
  for (const size_t chunk : {size_t{kUbatch}, size_t{7}, size_t{1}}) {
    const double error = relative_error(prefill_fresh(*backend_, tokens, chunk), expected);
    EXPECT_LE(error, kHalves) << "chunks of " << chunk;
    RecordProperty("chunk" + std::to_string(chunk), std::to_string(error));
  }
}

// Prefill in chunks of any size, and token by token as decode runs: rounding apart, the same.
TEST_P(CudaBackendTest, ChunksOfAnySizeAgree) {
  const std::vector<float> expected = prefill_fresh(*backend_, tokens_, 512);
  for (const size_t chunk : {64, 7, 1}) {
    const double error = relative_error(prefill_fresh(*backend_, tokens_, chunk), expected);
    EXPECT_LE(error, kHalves) << "chunks of " << chunk;
    RecordProperty("chunk" + std::to_string(chunk), std::to_string(error));
  }
}

TEST_P(CudaBackendTest, EqualRunsGiveEqualBits) {
  EXPECT_TRUE(prefill_fresh(*backend_, tokens_, 512) == prefill_fresh(*backend_, tokens_, 512));
}

TEST_P(CudaBackendTest, GraphsEqualDirectLaunches) {
  const auto direct = make(false);
  SamplingParams random;
  random.top_k = 40;
  random.top_p = 0.9f;
  random.seed = 7;
  KvSequence a(backend_->kv()), b(direct->kv());
  EXPECT_EQ(decode(*backend_, a, tokens_[0], 300, random),
            decode(*direct, b, tokens_[0], 300, random));
  // Every bit of what they left: the logits that follow.
  EXPECT_TRUE(prefill(*backend_, a, tokens_.first(3), 3) ==
              prefill(*direct, b, tokens_.first(3), 3));
}

TEST_P(CudaBackendTest, DirectWeightsGiveTheSameBits) {
  const auto direct = make(true, WeightStorage::kDirect);
  EXPECT_LE(direct->memory().weights_bytes, backend_->memory().weights_bytes);
  // Not the logits of more rows than a matrix instruction takes: blocks go through the head so many
  // at a time.
  const auto last_logits = [&](Backend& backend, size_t chunk) {
    KvSequence kv(backend.kv());
    prefill(backend, kv, tokens_.first(tokens_.size() - 8), chunk);
    return prefill(backend, kv, tokens_.last(8), 8);
  };
  for (const size_t chunk : {size_t{kUbatch}, size_t{20}, size_t{7}, size_t{1}}) {
    EXPECT_TRUE(last_logits(*direct, chunk) == last_logits(*backend_, chunk))
        << "chunks of " << chunk;
  }
}

TEST_P(CudaBackendTest, CompanyOfOtherSessionsChangesNoToken) {
  std::vector<std::vector<TokenId>> expected;
  for (size_t i = 0; i < 3; ++i) {
    KvSequence alone(backend_->kv());
    prefill(*backend_, alone, tokens_.subspan(100 * i, 50 + 40 * i), 512);
    expected.push_back(decode(*backend_, alone, tokens_[i], 20, greedy()));
  }
  // The same, a token of each in turn.
  std::vector<KvSequence> sequences;
  std::vector<std::vector<TokenId>> drawn(3);
  for (size_t i = 0; i < 3; ++i) {
    sequences.emplace_back(backend_->kv());
    prefill(*backend_, sequences[i], tokens_.subspan(100 * i, 50 + 40 * i), 512);
  }
  for (size_t n = 0; n < 20; ++n) {
    for (size_t i = 0; i < 3; ++i) {
      const TokenId token = n == 0 ? tokens_[i] : drawn[i].back();
      drawn[i].push_back(decode(*backend_, sequences[i], token, 1, greedy())[0]);
    }
  }
  EXPECT_EQ(drawn, expected);
}

// Decode rows and prefill chunks in one step: rounding apart, what each gives alone.
TEST_P(CudaBackendTest, MixedBatchesGiveWhatEachGivesAlone) {
  const std::span<const TokenId> parts[] = {tokens_.first(150), tokens_.subspan(150, 40),
                                            tokens_.subspan(300, 33), tokens_.subspan(400, 10)};
  std::vector<float> expected;
  for (const std::span<const TokenId> tokens : parts) {
    const std::vector<float> logits = prefill_fresh(*backend_, tokens, 512);
    expected.insert(expected.end(), logits.end() - model_.plan.vocabulary, logits.end());
  }
  KvSequence a(backend_->kv()), b(backend_->kv()), c(backend_->kv()), d(backend_->kv());
  prefill(*backend_, b, parts[1].first(39), 512);
  prefill(*backend_, d, parts[3].first(9), 512);
  a.prepare(150);
  b.prepare(1);
  c.prepare(33);
  d.prepare(1);
  const BatchSequence batch[] = {{parts[0], &a, 1, {}},
                                 {parts[1].last(1), &b, 1, {}},
                                 {parts[2], &c, 1, {}},
                                 {parts[3].last(1), &d, 1, {}}};
  BatchResult result;
  backend_->run({.sequences = batch, .stop = {}, .observe = {}}, result);
  EXPECT_LE(relative_error(result.logits, expected), kHalves);
}

// So many that each kind of matrix kernel has a turn.
TEST_P(CudaBackendTest, DecodesManySessionsTogether) {
  for (const size_t count : {2, 8, 11, 20, 40}) {
    std::vector<KvSequence> sequences;
    std::vector<TokenId> expected;
    const SamplingParams params = greedy();
    std::vector<BatchSequence> batch;
    for (size_t i = 0; i < count; ++i) {
      KvSequence alone(backend_->kv());
      prefill(*backend_, alone, tokens_.subspan(12 * i, 20 + i), 512);
      sequences.push_back(alone);
      expected.push_back(decode(*backend_, alone, tokens_[i], 1, params)[0]);
    }
    for (size_t i = 0; i < count; ++i) {
      sequences[i].prepare(1);
      batch.push_back({tokens_.subspan(i, 1), &sequences[i], 0,
                       SampleRequest{&params, sequences[i].length() + 1, {}}});
    }
    BatchResult result;
    backend_->run({.sequences = batch, .stop = {}, .observe = {}}, result);
    // Sums round differently in company: a near tie may go the other way.
    size_t differ = 0;
    for (size_t i = 0; i < count; ++i) differ += result.sampled[i] != expected[i];
    EXPECT_LE(differ, 1 + count / 20) << count << " sequences";
  }
}

TEST_P(CudaBackendTest, SamplesBesideLogits) {
  const SamplingParams params = greedy();
  const std::span tokens = tokens_.first(20);
  const std::vector<float> logits = prefill_fresh(*backend_, tokens, 512);
  const size_t vocabulary = model_.plan.vocabulary;
  const auto last = logits.end() - long(vocabulary);
  const TokenId expected{int32_t(std::max_element(last, logits.end()) - last)};

  KvSequence a(backend_->kv()), b(backend_->kv()), c(backend_->kv());
  for (KvSequence* kv : {&a, &b, &c}) kv->prepare(uint32_t(tokens.size()));
  const SampleRequest request{&params, tokens.size(), {}};
  const BatchSequence batch[] = {
      {tokens, &a, 0, request}, {tokens, &b, 3, request}, {tokens, &c, 1, {}}};
  BatchResult result;
  backend_->run({.sequences = batch, .stop = {}, .observe = {}}, result);
  EXPECT_EQ(result.sampled, std::vector<TokenId>(2, expected));
  ASSERT_EQ(result.logits.size(), 4 * vocabulary);
  EXPECT_LE(
      relative_error(std::span(result.logits).last(vocabulary), std::span(logits).last(vocabulary)),
      kHalves);
}

TEST_P(CudaBackendTest, StoppedBatchLeavesWhatWasCommitted) {
  expect_stop_keeps_what_was_committed(*backend_, model_);
}

// Each on a device of its own where there are two.
TEST(CudaBackendDevices, TwoBackendsRunInAnyThread) {
  const uint32_t devices = cuda::device_count();
  if (devices == 0) GTEST_SKIP() << "this machine has no CUDA device";
  const RealModel model("micro-gemma4-Q4_K_M.gguf");
  BackendOptions options = model.options(KvFormat::kF16);
  std::unique_ptr<Backend> backends[2];
  for (uint32_t i = 0; i < 2; ++i) {
    options.device = i % devices;
    backends[i] = cuda::make_cuda_backend(model.plan, options, {});
  }
  const std::span tokens = std::span(model.tokens).first(100);
  std::vector<float> logits[2];
  std::vector<std::thread> threads;
  for (size_t i = 0; i < 2; ++i)
    threads.emplace_back([&, i] { logits[i] = prefill_fresh(*backends[i], tokens, 7); });
  for (std::thread& thread : threads) thread.join();
  EXPECT_LE(relative_error(logits[1], logits[0]), kHalves);
}

// What `builder` makes of a model.
Plan plan_of(const test::GgufBuilder& builder, std::optional<gguf::GgufFile>& file) {
  const std::string path = testing::TempDir() + "nibble_cuda_backend_test.gguf";
  builder.write(path);
  file = gguf::GgufFile::open(path);
  std::filesystem::remove(path);
  return model::build_plan(*file);
}

// A layer of each kind with the largest model's attention, past the window.
TEST(CudaBackendShapes, ChunksOfAnySizeAgreeOnTheLargestModelsLayers) {
  if (cuda::device_count() == 0) GTEST_SKIP() << "this machine has no CUDA device";
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  test::GgufBuilder builder = test::small_gemma4({.hidden = 5376,
                                                  .ffn = 512,
                                                  .vocabulary = 256,
                                                  .query_heads = 32,
                                                  .kv_heads = {16, 4},
                                                  .head_dim_sliding = 256,
                                                  .head_dim_full = 512,
                                                  .window = 1024,
                                                  .matrix_type = quant::QuantType::kQ4_0});
  for (test::GgufBuilder::Tensor& tensor : builder.tensors) {
    if (tensor.type != uint32_t(quant::QuantType::kQ4_0)) continue;
    for (std::byte& byte : tensor.data) byte = std::byte(random());
    const uint16_t scale = f32_to_f16(0.01f);
    for (size_t at = 0; at < tensor.data.size(); at += sizeof(quant::BlockQ4_0))
      std::memcpy(&tensor.data[at], &scale, sizeof(scale));
  }
  std::optional<gguf::GgufFile> file;
  const Plan plan = plan_of(builder, file);
  BackendOptions options;
  options.ubatch = 512;
  options.max_kv_pages = {60, 60};
  const auto backend = cuda::make_cuda_backend(plan, options, {});
  std::vector<TokenId> tokens(1100);
  for (TokenId& token : tokens) token = {int32_t(random() % 256)};
  const std::vector<float> expected = prefill_fresh(*backend, tokens, 512);
  for (const size_t chunk : {64, 7, 1})
    EXPECT_LE(relative_error(prefill_fresh(*backend, tokens, chunk), expected), kHalves)
        << "chunks of " << chunk;
}

// Gate times up goes beyond f16's range, in some rows far beyond it; a norm brings it back.
TEST(CudaBackendShapes, GatedValuesBeyondF16AreNotLost) {
  if (cuda::device_count() == 0) GTEST_SKIP() << "this machine has no CUDA device";
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  test::GgufBuilder builder = test::small_gemma4(
      {.head_dim_sliding = 64, .head_dim_full = 64, .matrix_type = quant::QuantType::kF16});
  for (test::GgufBuilder::Tensor& tensor : builder.tensors) {
    if (tensor.type != uint32_t(quant::QuantType::kF16)) continue;
    const bool gated = tensor.name.ends_with("gate.weight") || tensor.name.ends_with("up.weight");
    std::normal_distribution<float> weights(0, gated ? 500 : 0.2f);
    for (size_t at = 0; at < tensor.data.size(); at += sizeof(uint16_t)) {
      const uint16_t weight = f32_to_f16(weights(random));
      std::memcpy(&tensor.data[at], &weight, sizeof(weight));
    }
  }
  std::optional<gguf::GgufFile> file;
  const Plan plan = plan_of(builder, file);
  BackendOptions options;
  options.ubatch = 32;
  options.max_kv_pages = {10, 10};
  std::vector<TokenId> tokens(40);
  for (TokenId& token : tokens) token = {int32_t(random() % 48)};
  const auto reference = reference::make_reference_backend(plan, options);
  const std::vector<float> expected = prefill_fresh(*reference, tokens, 32);
  for (const size_t chunk : {32, 1}) {
    const auto backend = cuda::make_cuda_backend(plan, options, {});
    EXPECT_LE(relative_error(prefill_fresh(*backend, tokens, chunk), expected), kHalves)
        << "chunks of " << chunk;
  }
}

TEST(CudaBackendLong, TenThousandGreedyTokensTwice) {
  if (cuda::device_count() == 0) GTEST_SKIP() << "this machine has no CUDA device";
  const RealModel model("micro-gemma4-Q4_K_M.gguf");
  BackendOptions options = model.options(KvFormat::kF16);
  options.max_kv_pages = {400, 400};
  const auto backend = cuda::make_cuda_backend(model.plan, options, {});
  std::vector<TokenId> runs[2];
  for (std::vector<TokenId>& run : runs) {
    KvSequence kv(backend->kv());
    run = decode(*backend, kv, model.tokens[0], 10'000, greedy());
  }
  EXPECT_TRUE(runs[0] == runs[1]);
}

}  // namespace
}  // namespace nibble

#endif
