// The CPU backend as a whole: against the reference, which computes every step in doubles, on real
// weights; and against itself, since neither chunks nor company may change a bit.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "conformance/real_model.h"
#include "cpu/cpu_backend.h"
#include "cpu/isa.h"
#include "reference/reference_backend.h"

namespace nibble {
namespace {

using namespace backend;
using namespace conformance;

size_t matrices_on_the_way(const Plan& plan) {
  size_t count = 0;
  for (const Step& step : plan.steps) {
    if (std::holds_alternative<NormQkvStep>(step) || std::holds_alternative<ProjectStep>(step) ||
        std::holds_alternative<LogitsStep>(step)) {
      count += 1;
    } else if (std::holds_alternative<GatedMlpStep>(step)) {
      count += 2;
    }
  }
  return count;
}

// Forces an instruction set while it lives.
class ForcedIsa {
 public:
  explicit ForcedIsa(std::string_view name) { setenv("NIBBLE_ISA", std::string(name).c_str(), 1); }
  ~ForcedIsa() { unsetenv("NIBBLE_ISA"); }
};

struct ReferenceCase {
  const char* file;
  KvFormat format;
  double error_per_matrix;  // relative, root mean square
};

// What one matrix adds. Floats: sqrt(n) roundings of 2^-24 in sums of n <= 512 products. 8 bits
// with a scale per 32 values: steps of max / 127, and so errors of step / sqrt(12), where the
// largest of 32 normal values is about 2.1 standard deviations; the largest of skewed activations
// are further out, twice as far.
const double kFloats = std::sqrt(512) * 0x1p-24;
const double kEightBits = 2 * 2.1 / 127 / std::sqrt(12);
// Halves as keys and values round by 2^-11 at most, which reaches the result through scores of
// some tens.
const double kHalfKeys = 16 * 0x1p-11;

const ReferenceCase kReferenceCases[] = {
    {"micro-gemma4-f16.gguf", KvFormat::kF32, kFloats},
    {"micro-gemma4-f16.gguf", KvFormat::kF16, kFloats},
    {"wide-gemma4-Q4_K_M.gguf", KvFormat::kF32, kEightBits},
    {"micro-gemma4-Q8_0.gguf", KvFormat::kF16, kEightBits},
};

class AgainstReference : public testing::TestWithParam<ReferenceCase> {};

INSTANTIATE_TEST_SUITE_P(, AgainstReference, testing::ValuesIn(kReferenceCases),
                         [](const auto& info) {
                           std::string name = std::string(info.param.file) + "_" +
                                              std::string(to_string(info.param.format));
                           std::ranges::replace_if(
                               name, [](char c) { return !std::isalnum(c); }, '_');
                           return name;
                         });

TEST_P(AgainstReference, LogitsOfEveryPositionOnEveryIsa) {
  const RealModel model(GetParam().file);
  const std::span tokens = std::span(model.tokens).first(200);  // past the window of 128
  const auto reference =
      reference::make_reference_backend(model.plan, model.options(GetParam().format));
  const std::vector<float> expected = prefill_fresh(*reference, tokens, kUbatch);
  // Errors of different matrices are independent, and no norm makes more of them than it makes of
  // the values; a factor of 2 covers that the last ones weigh more.
  double tolerance =
      2 * GetParam().error_per_matrix * std::sqrt(double(matrices_on_the_way(model.plan)));
  // Keys that round differently: an f16 tie decided by the last bit of a float.
  if (GetParam().format == KvFormat::kF16) tolerance = std::max(tolerance, 0.02 * kHalfKeys);
  for (cpu::Isa isa : cpu::available_isas()) {
    const ForcedIsa forced(cpu::isa_name(isa));
    const auto backend = cpu::make_cpu_backend(model.plan, model.options(GetParam().format));
    EXPECT_NE(backend->description().find(cpu::isa_name(isa)), std::string::npos);
    const double error = relative_error(prefill_fresh(*backend, tokens, kUbatch), expected);
    EXPECT_LE(error, tolerance) << cpu::isa_name(isa);
    RecordProperty(std::string(cpu::isa_name(isa)), std::to_string(error));
  }
}

class CpuBackendTest : public testing::TestWithParam<const char*> {
 protected:
  const RealModel model_{GetParam()};
  const std::unique_ptr<Backend> backend_ =
      cpu::make_cpu_backend(model_.plan, model_.options(KvFormat::kF16));
  std::span<const TokenId> tokens_ = std::span<const TokenId>(model_.tokens).first(560);
};

INSTANTIATE_TEST_SUITE_P(, CpuBackendTest,
                         testing::Values("micro-gemma4-f16.gguf", "wide-gemma4-Q4_K_M.gguf"),
                         [](const auto& info) { return std::string(info.param, 4); });

TEST_P(CpuBackendTest, ChunksChangeNoBit) {
  const std::vector<float> expected = prefill_fresh(*backend_, tokens_, 512);
  for (size_t chunk : {1, 7, 64}) {
    EXPECT_TRUE(prefill_fresh(*backend_, tokens_, chunk) == expected) << "chunks of " << chunk;
  }
}

TEST_P(CpuBackendTest, CompanyChangesNoBit) {
  const std::span first = tokens_.first(150), second = tokens_.subspan(150, 40);
  const std::span third = tokens_.subspan(300, 33);
  std::vector<float> expected;
  for (std::span<const TokenId> tokens : {first, second, third}) {
    const std::vector<float> logits = prefill_fresh(*backend_, tokens, 512);
    expected.insert(expected.end(), logits.end() - model_.plan.vocabulary, logits.end());
  }
  // The first is in the middle of decoding, the others are prefilled.
  KvSequence a(backend_->kv()), b(backend_->kv()), c(backend_->kv());
  prefill(*backend_, a, first.first(149), 512);
  a.prepare(1);
  b.prepare(uint32_t(second.size()));
  c.prepare(uint32_t(third.size()));
  const BatchSequence batch[] = {
      {first.last(1), &a, 1, {}}, {second, &b, 1, {}}, {third, &c, 1, {}}};
  BatchResult result;
  backend_->run({.sequences = batch, .stop = {}, .observe = {}}, result);
  EXPECT_TRUE(result.logits == expected);
}

TEST_P(CpuBackendTest, SamplesBesideLogits) {
  SamplingParams greedy;
  greedy.temperature = 0;
  const std::span tokens = tokens_.first(20);
  const std::vector<float> logits = prefill_fresh(*backend_, tokens, 512);
  const size_t vocabulary = model_.plan.vocabulary;
  const auto last = logits.end() - long(vocabulary);
  const TokenId expected{int32_t(std::max_element(last, logits.end()) - last)};

  KvSequence a(backend_->kv()), b(backend_->kv()), c(backend_->kv());
  for (KvSequence* kv : {&a, &b, &c}) kv->prepare(uint32_t(tokens.size()));
  const SampleRequest request{&greedy, tokens.size(), {}};
  const BatchSequence batch[] = {
      {tokens, &a, 0, request}, {tokens, &b, 3, request}, {tokens, &c, 1, {}}};
  BatchResult result;
  backend_->run({.sequences = batch, .stop = {}, .observe = {}}, result);
  EXPECT_EQ(result.sampled, std::vector<TokenId>(2, expected));
  ASSERT_EQ(result.logits.size(), 4 * vocabulary);
  EXPECT_TRUE(std::equal(result.logits.begin(), result.logits.end() - long(vocabulary),
                         logits.end() - 3 * long(vocabulary)));
  EXPECT_TRUE(std::equal(last, logits.end(), result.logits.end() - long(vocabulary)));
}

TEST_P(CpuBackendTest, StoppedBatchLeavesWhatWasCommitted) {
  expect_stop_keeps_what_was_committed(*backend_, model_);
}

TEST_P(CpuBackendTest, WeightsAreTheFilesOwnAndPagesAreTakenWhenNeeded) {
  EXPECT_EQ(backend_->memory().weights_bytes, model_.plan.weight_bytes());
  EXPECT_EQ(backend_->memory().kv_bytes, 0u);
  KvSequence kv(backend_->kv());
  prefill(*backend_, kv, tokens_.first(33), 512);
  uint64_t two_pages_each = 0;
  for (const KvGroup& group : backend_->kv().groups()) two_pages_each += 2 * group.page_bytes;
  EXPECT_EQ(backend_->memory().kv_bytes, two_pages_each);
}

}  // namespace
}  // namespace nibble
