#include "model/model.h"

#include <gtest/gtest.h>

#include <cmath>

#include "base/error.h"
#include "support/expect_error.h"
#include "support/fixtures.h"
#include "support/small_gemma4.h"

namespace nibble::model {
namespace {

using backend::GatedMlpStep;
using backend::NormQkvStep;
using test::GgufBuilder;
using test::small_gemma4;
using test::SmallGemma4;

backend::Plan plan_of(const GgufBuilder& builder) {
  const std::vector<std::byte> bytes = builder.build();
  const gguf::GgufFile file = gguf::GgufFile::from_bytes(bytes);
  backend::Plan plan = build_plan(file);
  // The plan's views die with `bytes`; the tests look at shapes alone.
  for (backend::Weight& weight : plan.weights) {
    for (backend::WeightSegment& segment : weight.segments) segment.data = {};
  }
  return plan;
}

// Expects a refusal with `code` whose message contains every one of `parts`.
void expect_refused(const GgufBuilder& builder, ErrorCode code,
                    const std::vector<std::string>& parts) {
  const std::vector<std::byte> bytes = builder.build();
  const gguf::GgufFile file = gguf::GgufFile::from_bytes(bytes);
  test::expect_error(code, parts, [&] { build_plan(file); });
}

GgufBuilder without(const std::string& name) {
  return small_gemma4({.omit = {name}});
}

TEST(Model, SmallFileBecomesAPlan) {
  const backend::Plan plan = plan_of(small_gemma4());
  EXPECT_EQ(plan.architecture, "gemma4");
  EXPECT_EQ(plan.vocabulary, 48u);
  EXPECT_EQ(plan.trained_context, 512u);
  ASSERT_EQ(plan.caches.size(), 2u);
  EXPECT_EQ(plan.caches[0].window, 8u);
  EXPECT_FALSE(plan.caches[0].value_is_key);
  EXPECT_EQ(plan.caches[1].window, 0u);
  EXPECT_TRUE(plan.caches[1].value_is_key);
  // Embed, four steps for each layer, logits.
  ASSERT_EQ(plan.steps.size(), 10u);
  const auto& sliding = std::get<NormQkvStep>(plan.steps[1]);
  EXPECT_EQ(plan.weight(sliding.qkv).segments.size(), 3u);
  EXPECT_EQ(plan.weight(sliding.qkv).rows(), (4u + 2 + 2) * 8);
  const auto& full = std::get<NormQkvStep>(plan.steps[5]);
  EXPECT_EQ(plan.weight(full.qkv).segments.size(), 2u);
  EXPECT_EQ(plan.weight(full.qkv).rows(), (4u + 1) * 16);
  const auto& mlp = std::get<GatedMlpStep>(plan.steps[4]);
  EXPECT_EQ(plan.weight(mlp.gate_up).rows(), 2u * 64);
  EXPECT_EQ(plan.weight(mlp.gate_up).segments[1].name, "blk.0.ffn_up.weight");
}

TEST(Model, RopeFrequenciesFollowBaseAndFactors) {
  GgufBuilder builder = without("rope_freqs.weight");
  std::vector<float> factors(8, 1e30f);
  factors[0] = factors[1] = 1.0f;
  builder.f32_tensor("rope_freqs.weight", {8}, factors);
  const backend::Plan plan = plan_of(builder);
  const auto& sliding = std::get<NormQkvStep>(plan.steps[1]).rope.inverse_frequencies;
  const auto& full = std::get<NormQkvStep>(plan.steps[5]).rope.inverse_frequencies;
  ASSERT_EQ(sliding.size(), 4u);
  for (size_t d = 0; d < 4; ++d) EXPECT_FLOAT_EQ(sliding[d], float(std::pow(1e4, -2.0 * d / 8)));
  ASSERT_EQ(full.size(), 8u);
  EXPECT_FLOAT_EQ(full[1], float(std::pow(1e6, -2.0 / 16)));
  for (size_t d = 2; d < 8; ++d) EXPECT_EQ(full[d], 0.0f);
}

TEST(Model, RealFilesBecomePlans) {
  for (const char* name : {"micro-gemma4-f16", "micro-gemma4-Q4_K_M", "wide-gemma4-Q4_K_M"}) {
    const auto path = test::fixture(std::string("models/") + name + ".gguf");
    const gguf::GgufFile file = gguf::GgufFile::open(path);
    const backend::Plan plan = build_plan(file);
    EXPECT_EQ(plan.caches.size(), 6u) << name;
    EXPECT_EQ(plan.vocabulary, 2048u) << name;
    EXPECT_LE(plan.weight_bytes(), file.file_bytes()) << name;
    EXPECT_GT(plan.weight_bytes(), file.file_bytes() * 9 / 10) << name;
  }
}

TEST(Model, OtherArchitecturesAreRefusedWithTheList) {
  GgufBuilder builder = without("general.architecture");
  builder.string("general.architecture", "llama");
  expect_refused(builder, ErrorCode::kUnsupported, {"\"llama\"", "gemma4"});
  expect_refused(without("general.architecture"), ErrorCode::kMalformedFile,
                 {"general.architecture"});
}

TEST(Model, PartsOfTheFamilyNotRunYetAreRefusedByName) {
  const std::pair<const char*, const char*> parts[] = {
      {"gemma4.embedding_length_per_layer_input", "per-layer embeddings"},
      {"gemma4.attention.shared_kv_layers", "share keys and values"},
      {"gemma4.expert_count", "experts"}};
  for (const auto& [key, what] : parts) {
    GgufBuilder builder = without(key);
    builder.u32(key, 2);
    expect_refused(builder, ErrorCode::kUnsupported, {key, "2", what});
  }
}

TEST(Model, EveryMissingKeyAndTensorIsNamed) {
  for (const char* name : {"gemma4.block_count",
                           "gemma4.context_length",
                           "gemma4.embedding_length",
                           "gemma4.feed_forward_length",
                           "gemma4.attention.head_count",
                           "gemma4.attention.head_count_kv",
                           "gemma4.attention.key_length",
                           "gemma4.attention.key_length_swa",
                           "gemma4.rope.freq_base",
                           "gemma4.rope.freq_base_swa",
                           "gemma4.attention.sliding_window",
                           "gemma4.attention.sliding_window_pattern",
                           "gemma4.attention.layer_norm_rms_epsilon",
                           "token_embd.weight",
                           "output_norm.weight",
                           "blk.0.attn_q.weight",
                           "blk.1.attn_k.weight",
                           "blk.0.attn_output.weight",
                           "blk.1.ffn_gate.weight",
                           "blk.1.ffn_up.weight",
                           "blk.0.ffn_down.weight",
                           "blk.0.attn_norm.weight",
                           "blk.1.attn_q_norm.weight",
                           "blk.1.attn_k_norm.weight",
                           "blk.0.post_attention_norm.weight",
                           "blk.0.ffn_norm.weight",
                           "blk.1.post_ffw_norm.weight"}) {
    expect_refused(without(name), ErrorCode::kMalformedFile, {name});
  }
}

TEST(Model, OptionalPartsMayBeAbsent) {
  for (const char* name : {"rope_freqs.weight", "blk.1.layer_output_scale.weight",
                           "gemma4.final_logit_softcapping", "gemma4.attention.value_length",
                           "gemma4.rope.dimension_count_swa", "gemma4.expert_count"}) {
    EXPECT_NO_THROW(plan_of(without(name))) << name;
  }
}

TEST(Model, CountsOutOfRangeAreRefused) {
  for (const char* key : {"gemma4.block_count", "gemma4.context_length", "gemma4.embedding_length",
                          "gemma4.feed_forward_length", "gemma4.attention.head_count",
                          "gemma4.attention.key_length", "gemma4.attention.sliding_window"}) {
    for (uint32_t value : {0u, 1u << 31, UINT32_MAX}) {
      GgufBuilder builder = without(key);
      builder.u32(key, value);
      expect_refused(builder, ErrorCode::kMalformedFile, {key, std::to_string(value)});
    }
  }
  GgufBuilder builder = without("gemma4.block_count");
  builder.u32("gemma4.block_count", 1000000);
  expect_refused(builder, ErrorCode::kMalformedFile, {"gemma4.block_count", "1000000"});
}

TEST(Model, WrongKindsOfMetadataAreRefused) {
  GgufBuilder pattern = without("gemma4.attention.sliding_window_pattern");
  pattern.u32("gemma4.attention.sliding_window_pattern", 6);
  expect_refused(pattern, ErrorCode::kMalformedFile, {"gemma4.attention.sliding_window_pattern"});

  GgufBuilder short_pattern = without("gemma4.attention.sliding_window_pattern");
  short_pattern.bool_array("gemma4.attention.sliding_window_pattern", {true});
  expect_refused(short_pattern, ErrorCode::kMalformedFile, {"sliding_window_pattern", "1", "2"});

  GgufBuilder kv_heads = without("gemma4.attention.head_count_kv");
  kv_heads.u32_array("gemma4.attention.head_count_kv", {2, 1, 1});
  expect_refused(kv_heads, ErrorCode::kMalformedFile, {"head_count_kv", "3", "2"});

  for (float value : {0.0f, -1.0f, NAN, INFINITY}) {
    GgufBuilder epsilon = without("gemma4.attention.layer_norm_rms_epsilon");
    epsilon.f32("gemma4.attention.layer_norm_rms_epsilon", value);
    expect_refused(epsilon, ErrorCode::kMalformedFile, {"layer_norm_rms_epsilon"});
    if (value == 0) continue;  // no soft cap
    GgufBuilder softcap = without("gemma4.final_logit_softcapping");
    softcap.f32("gemma4.final_logit_softcapping", value);
    expect_refused(softcap, ErrorCode::kMalformedFile, {"final_logit_softcapping"});
  }
}

TEST(Model, HeadsMustFitTogether) {
  expect_refused(small_gemma4({.kv_heads = {3, 1}}), ErrorCode::kMalformedFile,
                 {"head_count", "4", "3"});
  GgufBuilder odd = without("gemma4.attention.key_length");
  odd.u32("gemma4.attention.key_length", 17);
  expect_refused(odd, ErrorCode::kMalformedFile, {"key_length", "17", "even"});
  GgufBuilder values = without("gemma4.attention.value_length");
  values.u32("gemma4.attention.value_length", 32);
  expect_refused(values, ErrorCode::kMalformedFile, {"value_length", "32", "16"});
}

TEST(Model, ShapesThatContradictTheHyperParametersAreNamed) {
  // A layer count, head count or head size that does not match shows in the tensors.
  GgufBuilder layers =
      small_gemma4({.omit = {"gemma4.block_count", "gemma4.attention.head_count_kv",
                             "gemma4.attention.sliding_window_pattern"}});
  layers.u32("gemma4.block_count", 3)
      .u32_array("gemma4.attention.head_count_kv", {2, 1, 1})
      .bool_array("gemma4.attention.sliding_window_pattern", {true, false, false});
  expect_refused(layers, ErrorCode::kMalformedFile, {"blk.2."});

  GgufBuilder heads = without("gemma4.attention.head_count");
  heads.u32("gemma4.attention.head_count", 8);
  expect_refused(heads, ErrorCode::kMalformedFile, {"blk.0.attn_q.weight", "[32, 32]", "[32, 64]"});

  GgufBuilder norm = without("blk.0.ffn_norm.weight");
  norm.f32_tensor("blk.0.ffn_norm.weight", {31}, std::vector<float>(31, 1.0f));
  expect_refused(norm, ErrorCode::kMalformedFile, {"blk.0.ffn_norm.weight", "[31]", "[32]"});
}

}  // namespace
}  // namespace nibble::model
