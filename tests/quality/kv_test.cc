// What each KV format does to predictions, with f32 activations and exactly dequantised weights, so
// that nothing else does anything: docs/formats/kv-quality.md.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "conformance/real_model.h"
#include "cpu/cpu_backend.h"
#include "support/round_to_nearest.h"

namespace nibble {
namespace {

using namespace backend;
using conformance::RealModel;

constexpr size_t kWindows = 16, kWindowTokens = 512;

// Of rows [vocabulary] of logits.
std::vector<double> log_probabilities(std::span<const float> logits) {
  const double top = *std::ranges::max_element(logits);
  double sum = 0;
  for (const float logit : logits) sum += std::exp(logit - top);
  std::vector<double> result(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) result[i] = logits[i] - top - std::log(sum);
  return result;
}

double divergence(std::span<const float> p_logits, std::span<const float> q_logits) {
  const std::vector<double> p = log_probabilities(p_logits), q = log_probabilities(q_logits);
  double sum = 0;
  for (size_t i = 0; i < p.size(); ++i) sum += std::exp(p[i]) * (p[i] - q[i]);
  return sum;
}

class KvQuality : public testing::TestWithParam<std::tuple<std::string, KvLayout>> {
 protected:
  // The format in layers without a window; the others stay exact.
  KvOptions full(KvFormat format) const {
    return {.format = format,
            .window_format = KvFormat::kF32,
            .layout = std::get<KvLayout>(GetParam())};
  }
  // Mean KL from what an f32 cache in split rows predicts.
  double mean_divergence(Backend& backend) {
    double sum = 0;
    for (size_t window = 0; window < kWindows; ++window) {
      const std::vector<float> logits = logits_of(backend, window);
      for (size_t row = 0; row < kWindowTokens; ++row)
        sum += divergence(row_of(exact_[window], row), row_of(logits, row));
    }
    return sum / (kWindows * kWindowTokens);
  }
  double mean_divergence(const KvOptions& kv) {
    return mean_divergence(*cpu::make_cpu_backend(plan_, model_.options(kv)));
  }
  // The rows of layers without a window rounded to the nearest of 16 steps.
  double nearest_divergence(size_t block) {
    const auto change = [block](uint32_t window, std::span<float> row) {
      if (window == 0) test::round_to_nearest_4bit(row, block);
    };
    return mean_divergence(
        *cpu::make_cpu_backend_with(plan_, model_.options(full(KvFormat::kF32)), change));
  }

 private:
  std::vector<float> logits_of(Backend& backend, size_t window) const {
    const std::span tokens(model_.tokens);
    return conformance::prefill_fresh(
        backend, tokens.subspan(window * kWindowTokens, kWindowTokens), kWindowTokens);
  }
  std::span<const float> row_of(const std::vector<float>& logits, size_t row) const {
    return std::span(logits).subspan(row * model_.plan.vocabulary, model_.plan.vocabulary);
  }

  const RealModel model_{std::get<std::string>(GetParam()) + ".gguf"};
  std::vector<std::vector<float>> weights_;  // of plan_'s segments
  const Plan plan_ = [this] {
    Plan plan = model_.plan;
    for (Weight& weight : plan.weights) {
      for (WeightSegment& segment : weight.segments) {
        std::vector<float>& values = weights_.emplace_back(size_t{segment.rows} * weight.columns);
        quant::quant_traits(segment.type).dequantize(segment.data, values);
        segment.type = quant::QuantType::kF32;
        segment.data = std::as_bytes(std::span(values));
      }
    }
    return plan;
  }();
  const std::vector<std::vector<float>> exact_ = [this] {
    const auto backend = cpu::make_cpu_backend(plan_, model_.options(KvFormat::kF32));
    std::vector<std::vector<float>> all;
    for (size_t i = 0; i < kWindows; ++i) all.push_back(logits_of(*backend, i));
    return all;
  }();
};

TEST_P(KvQuality, FormatsLoseNoMoreThanTheyMay) {
  const auto measured = [&](std::string_view name, double kl) {
    const auto& [model, layout] = GetParam();
    fmt::print("{}, {} rows: {} mean KL {:.3g}\n", model,
               layout == KvLayout::kSplit ? "split" : "shared", name, kl);
    return kl;
  };
  using enum KvFormat;
  EXPECT_LE(measured("f32", mean_divergence(full(kF32))), 1e-9);
  EXPECT_LE(measured("f16", mean_divergence(full(kF16))), 1e-6);
  EXPECT_LE(measured("q8", mean_divergence(full(kQ8))), 1.5e-4);
  KvOptions everywhere = full(kQ8);
  everywhere.window_format = kQ8;
  EXPECT_LE(measured("q8 in windows, too,", mean_divergence(everywhere)), 1.5e-4);
  const double tq4 = measured("tq4", mean_divergence(full(kTq4)));
  // Shared rows leave key_norm's weight to the query: 1.07 and 0.74 on wide, 1.04 and 0.66 split.
  const bool split = std::get<KvLayout>(GetParam()) == KvLayout::kSplit;
  EXPECT_LE(tq4, (split ? 1.05 : 1.1) * measured("nearest per 32", nearest_divergence(32)));
  EXPECT_LE(tq4, (split ? 0.7 : 0.8) * measured("nearest per 128", nearest_divergence(128)));
  EXPECT_GT(tq4, 1e-5);  // or it was not used
}

std::string case_name(const testing::TestParamInfo<KvQuality::ParamType>& info) {
  const auto& [model, layout] = info.param;
  return model.substr(0, model.find('-')) + (layout == KvLayout::kSplit ? "_split" : "_shared");
}

INSTANTIATE_TEST_SUITE_P(Models, KvQuality,
                         testing::Combine(testing::Values("micro-gemma4-f16", "wide-gemma4-Q4_K_M",
                                                          "tiny-gemma4-Q4_K_M"),
                                          testing::Values(KvLayout::kSplit, KvLayout::kAuto)),
                         case_name);

}  // namespace
}  // namespace nibble
