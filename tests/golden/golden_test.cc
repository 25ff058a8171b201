// The whole model against golden data: micro-gemma4-f16 as Hugging Face transformers runs it in
// float32, on every backend, with the most exact KV that it has.

#include <gtest/gtest.h>

#include <algorithm>
#include <boost/json.hpp>
#include <cmath>
#include <memory>
#include <string>
#include <tuple>
#include <variant>
#include <vector>

#include "backend/backend.h"
#include "cpu/cpu_backend.h"
#ifdef NIBBLE_HAS_CUDA
#include "cuda/cuda_backend.h"
#endif
#include "gguf/gguf_file.h"
#include "model/model.h"
#include "reference/reference_backend.h"
#include "support/fixtures.h"

namespace nibble {
namespace {

using namespace backend;

struct BackendCase {
  std::string name;
  std::unique_ptr<Backend> (*make)(const Plan&, const BackendOptions&);
  uint32_t (*devices)();
  KvFormat kv_format;
  double error_per_layer;   // of the residual, relative to its largest value
  double logits_tolerance;  // in a range of +-20
};

uint32_t one_device() {
  return 1;
}

// What float32 costs, relative to a row's largest value: roundings of random sign in a sum of n
// products add up to about sqrt(n) * 2^-24, and in each layer the residual takes up the results of
// four matrices, of at most 512 columns here.
const double kFloatErrorPerLayer = 4 * std::sqrt(512) * 0x1p-24;
// The same matrices on activations rounded to f16: 2^-11 of each at most.
const double kHalfErrorPerLayer = 4 * 0x1p-11;

struct Prompt {
  std::vector<TokenId> tokens, greedy;
  std::vector<float> logits;  // [8, vocabulary], of the last positions
  std::vector<float> layers;  // [1 + layers, hidden], of the last position
};

std::vector<TokenId> token_ids(const boost::json::value& array) {
  std::vector<TokenId> tokens;
  for (const auto& id : array.as_array()) tokens.push_back({id.to_number<int32_t>()});
  return tokens;
}

Prompt read_prompt(const std::string& name) {
  const auto json = boost::json::parse(test::read_file(test::fixture("golden/" + name + ".json")));
  return {.tokens = token_ids(json.at("tokens")),
          .greedy = token_ids(json.at("greedy")),
          .logits = test::read_f32(test::fixture("golden/" + name + ".logits.f32")),
          .layers = test::read_f32(test::fixture("golden/" + name + ".layers.f32"))};
}

class Golden : public testing::TestWithParam<std::tuple<BackendCase, const char*>> {
 protected:
  void SetUp() override {
    if (backend_case().devices() == 0) GTEST_SKIP() << "this machine has no device for it";
    backend_ = backend_case().make(plan_, {.kv = KvOptions::all(backend_case().kv_format),
                                           .ubatch = 512,
                                           .threads = 0,
                                           .max_kv_pages = {64, 64}});
  }
  const BackendCase& backend_case() const { return std::get<0>(GetParam()); }

  const gguf::GgufFile file_ = gguf::GgufFile::open(test::fixture("models/micro-gemma4-f16.gguf"));
  const Plan plan_ = model::build_plan(file_);
  std::unique_ptr<Backend> backend_;
  const Prompt prompt_ = read_prompt(std::get<1>(GetParam()));
};

TEST_P(Golden, LogitsAndEveryLayerOfThePrompt) {
  KvSequence sequence(backend_->kv());
  sequence.prepare(uint32_t(prompt_.tokens.size()));
  const BatchSequence part{prompt_.tokens, &sequence, 8, {}};
  std::vector<std::vector<float>> layers;  // the last position's residual: embedding, layers
  const auto observe = [&](size_t step, ValueId, std::span<const float> rows) {
    if (std::holds_alternative<EmbedStep>(plan_.steps[step]) ||
        std::holds_alternative<GatedMlpStep>(plan_.steps[step])) {
      const auto last = rows.last(plan_.hidden);
      layers.emplace_back(last.begin(), last.end());
    }
  };
  BatchResult result;
  backend_->run({.sequences = std::span(&part, 1), .stop = {}, .observe = observe}, result);

  ASSERT_EQ(layers.size() * plan_.hidden, prompt_.layers.size());
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const float* expected = &prompt_.layers[layer * plan_.hidden];
    double magnitude = 0, error = 0;
    for (size_t i = 0; i < plan_.hidden; ++i) {
      magnitude = std::max(magnitude, double{std::abs(expected[i])});
      error = std::max(error, double{std::abs(layers[layer][i] - expected[i])});
    }
    EXPECT_LE(error, std::max(0x1p-23, double(layer) * backend_case().error_per_layer) * magnitude)
        << "after " << layer << " layers";
  }

  ASSERT_EQ(result.logits.size(), prompt_.logits.size());
  double error = 0;
  for (size_t i = 0; i < result.logits.size(); ++i) {
    error = std::max(error, double{std::abs(result.logits[i] - prompt_.logits[i])});
  }
  EXPECT_LE(error, backend_case().logits_tolerance);
}

TEST_P(Golden, GreedyContinuation) {
  KvSequence sequence(backend_->kv());
  SamplingParams greedy;
  greedy.temperature = 0;
  std::vector<TokenId> pending = prompt_.tokens;
  std::vector<TokenId> continuation;
  while (continuation.size() < prompt_.greedy.size()) {
    const uint32_t count = uint32_t(pending.size());
    sequence.prepare(count);
    const SampleRequest request{&greedy, sequence.length() + count, {}};
    const BatchSequence part{pending, &sequence, 0, request};
    BatchResult result;
    backend_->run({.sequences = std::span(&part, 1), .stop = {}, .observe = {}}, result);
    sequence.commit(count);
    pending = result.sampled;
    continuation.push_back(pending.at(0));
  }
  EXPECT_EQ(continuation, prompt_.greedy);
}

const BackendCase kBackendCases[] = {
    {"reference", reference::make_reference_backend, one_device, KvFormat::kF32,
     kFloatErrorPerLayer, 1e-4},
    {"cpu", cpu::make_cpu_backend, one_device, KvFormat::kF32, kFloatErrorPerLayer, 2e-3},
#ifdef NIBBLE_HAS_CUDA
    {"cuda",
     [](const Plan& plan, const BackendOptions& options) {
       return cuda::make_cuda_backend(plan, options, {});
     },
     cuda::device_count, KvFormat::kF16, kHalfErrorPerLayer, 0.02},
#endif
};

INSTANTIATE_TEST_SUITE_P(Micro, Golden,
                         testing::Combine(testing::ValuesIn(kBackendCases),
                                          testing::Values("chat", "freedom", "longer_than_window")),
                         [](const auto& info) {
                           return std::get<0>(info.param).name + "_" + std::get<1>(info.param);
                         });

}  // namespace
}  // namespace nibble
