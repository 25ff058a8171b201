#include "engine/memory.h"

#include <gtest/gtest.h>

#include "base/error.h"
#include "engine/engine.h"

namespace nibble::engine {
namespace {

using backend::KvFormat;
using backend::KvOptions;

constexpr std::byte kWeights[1000] = {};

// One sliding and one full layer of 64 floats each for K and V; 1000 bytes of weights.
backend::Plan plan_of(uint32_t trained_context) {
  backend::Plan plan;
  plan.trained_context = trained_context;
  plan.vocabulary = 100;
  plan.hidden = 16;
  plan.values = {{"x", 16}};
  plan.caches = {{2, 32, 128, false}, {1, 64, 0, false}};
  plan.weights = {{.columns = 16, .segments = {{"w", quant::QuantType::kF32, 1, kWeights}}}};
  return plan;
}

SizeRequest request(uint32_t context, uint32_t sessions = 1) {
  return {.kv = {},
          .alternatives = {KvOptions{}, KvOptions::all(KvFormat::kF32)},
          .context = context,
          .sessions = sessions,
          .ubatch = 64,
          .snapshots = 2};
}

TEST(MemoryNeeds, KvFollowsContextWindowAndFormat) {
  const backend::Plan plan = plan_of(8192);
  EngineOptions options;
  options.backend = "cpu";
  options.context = 4096;
  options.ubatch = 64;
  const MemoryNeeds f16 = memory_needs(plan, options);
  EXPECT_EQ(f16.weights_bytes, 1000u);
  const uint64_t page = 2 * 64 * 32 * 2;
  // Full layer: 128 pages and one for each snapshot; sliding: window, ubatch and a page, and the
  // window and a page for each snapshot.
  const uint64_t full = 128, sliding = (128 + 64 + 32) / 32;
  const uint64_t snapshot = 1 + (128 + 32) / 32;
  EXPECT_EQ(f16.kv_bytes, page * (full + sliding + kTurnSnapshots * snapshot));
  EXPECT_EQ(f16.driver_bytes, 0u);
  options.snapshots = 0;
  EXPECT_EQ(memory_needs(plan, options).kv_bytes, page * (full + sliding));
  options.sessions = 3;
  EXPECT_EQ(memory_needs(plan, options).kv_bytes, 3 * page * (full + sliding));
  options.kv_format = KvFormat::kF32;
  EXPECT_EQ(memory_needs(plan, options).kv_bytes, 6 * page * (full + sliding));
  options.backend = "cuda";
  options.kv_format = {};
  const MemoryNeeds cuda = memory_needs(plan, options);
  EXPECT_GT(cuda.driver_bytes, 0u);
  EXPECT_EQ(cuda.total(),
            cuda.weights_bytes + cuda.kv_bytes + cuda.workspace_bytes + cuda.driver_bytes);
}

TEST(KvOptions, LongContextsAreQ8UnlessSaidOtherwise) {
  const backend::Plan plan = plan_of(100'000);
  const auto format = [&](const char* backend, uint32_t context,
                          std::optional<KvFormat> asked = {}) {
    EngineOptions options;
    options.backend = backend;
    options.context = context;
    options.kv_format = asked;
    return kv_options(plan, options).format;
  };
  for (const char* backend : {"cpu", "cuda"}) {
    EXPECT_EQ(format(backend, 0), KvFormat::kF16);
    EXPECT_EQ(format(backend, 8192), KvFormat::kF16);
    EXPECT_EQ(format(backend, 8193), KvFormat::kQ8);
    EXPECT_EQ(format(backend, 100'000, KvFormat::kF16), KvFormat::kF16);
    EXPECT_EQ(format(backend, 512, KvFormat::kTq4), KvFormat::kTq4);
  }
  EXPECT_EQ(format("reference", 100'000), KvFormat::kF32);

  backend::Plan odd = plan;
  odd.caches[1].head_dim = 80;
  EngineOptions options;
  options.backend = "cpu";
  options.context = 100'000;
  EXPECT_EQ(kv_options(odd, options).format, KvFormat::kF16);
}

TEST(MemoryNeeds, OfNoBackendAreAnError) {
  EngineOptions options;
  for (const char* backend : {"abacus", "metal", ""}) {
    options.backend = backend;
    EXPECT_THROW(default_ubatch(backend), Error);
    EXPECT_THROW(kv_options(plan_of(512), options), Error);
    EXPECT_THROW(memory_needs(plan_of(512), options), Error);
    EXPECT_TRUE(kv_formats(backend).empty());
  }
  EXPECT_GT(default_ubatch("cuda"), 0u);  // also where the build has none
}

TEST(Fit, TakesTheTrainedContextWhereItFits) {
  EXPECT_EQ(fit(plan_of(8192), request(0), uint64_t{1} << 40).context, 8192u);
  EXPECT_EQ(fit(plan_of(8192), request(100), uint64_t{1} << 40).context, 100u);
  EXPECT_EQ(fit(plan_of(8192), request(10'000), uint64_t{1} << 40).context, 10'000u);
}

TEST(Fit, ElseTheLargestThatFits) {
  const backend::Plan plan = plan_of(1'000'000);
  const uint64_t free_bytes = 100'000'000;
  const uint32_t context = fit(plan, request(0), free_bytes).context;
  const uint64_t usable = free_bytes - free_bytes / 16;
  EXPECT_LE(needs_of(plan, request(context)).total(), usable);
  EXPECT_GT(needs_of(plan, request(context + 1)).total(), usable);
  const uint32_t shared = fit(plan, request(0, 10), free_bytes).context;
  EXPECT_LT(shared, context / 9);
}

TEST(Fit, PagesServeAllSessions) {
  const Size one = fit(plan_of(8192), request(4096), uint64_t{1} << 40);
  const Size five = fit(plan_of(8192), request(4096, 5), uint64_t{1} << 40);
  ASSERT_EQ(one.max_kv_pages.size(), 2u);
  for (size_t g = 0; g < 2; ++g) EXPECT_EQ(five.max_kv_pages[g], 5 * one.max_kv_pages[g]);
}

TEST(Fit, SnapshotsAreGivenUpBeforeContext) {
  const backend::Plan plan = plan_of(8192);
  for (uint32_t snapshots = 0; snapshots <= 2; ++snapshots) {
    SizeRequest with = request(8192);
    with.snapshots = snapshots;
    const uint64_t needed = needs_of(plan, with).total();
    EXPECT_EQ(fit(plan, request(8192), needed).snapshots, snapshots);
    if (snapshots > 0) {
      EXPECT_EQ(fit(plan, request(8192), needed - 1).snapshots, snapshots - 1);
    }
    uint64_t pages_bytes = 0;
    const Size size = fit(plan, request(8192), needed);
    const std::vector<backend::KvGroup> groups = make_kv_groups(plan, {});
    for (size_t g = 0; g < 2; ++g) pages_bytes += size.max_kv_pages[g] * groups[g].page_bytes;
    EXPECT_EQ(pages_bytes, needs_of(plan, with).kv_bytes);
  }
}

std::string refusal(const backend::Plan& plan, const SizeRequest& request, uint64_t free_bytes) {
  try {
    fit(plan, request, free_bytes);
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
    return error.what();
  }
  ADD_FAILURE() << "it fitted";
  return "";
}

TEST(Fit, RefusalSaysNeededFreeAndWhatWouldFit) {
  const backend::Plan plan = plan_of(1'000'000);
  SizeRequest large = request(1'000'000);
  large.kv = KvOptions::all(KvFormat::kF32);
  large.advice = "; or a larger machine";
  const std::string message = refusal(plan, large, 100'000'000);
  SizeRequest least = large;
  least.snapshots = 0;
  const uint64_t needed = needs_of(plan, least).total();
  EXPECT_NE(message.find(std::to_string(needed) + " bytes"), std::string::npos) << message;
  EXPECT_NE(message.find("100000000 bytes"), std::string::npos) << message;
  const uint32_t f16 = fit(plan, request(0), 100'000'000).context;
  EXPECT_NE(message.find("-c " + std::to_string(f16) + " --kv f16"), std::string::npos) << message;
  EXPECT_TRUE(message.ends_with(large.advice)) << message;
}

TEST(Fit, NothingAtAllFits) {
  const backend::Plan plan = plan_of(8192);
  for (const uint64_t free_bytes : {0u, 999u, 20'000u}) {
    EXPECT_NE(refusal(plan, request(0), free_bytes).find("not even one token"), std::string::npos);
  }
}

TEST(Fit, AbsurdRequestsAreRefusedNotOverflowed) {
  const backend::Plan plan = plan_of(UINT32_MAX);
  SizeRequest absurd = request(UINT32_MAX, UINT32_MAX);
  refusal(plan, absurd, uint64_t{1} << 50);
  absurd = request(0, UINT32_MAX);
  EXPECT_NE(refusal(plan, absurd, uint64_t{1} << 30), "");
}

}  // namespace
}  // namespace nibble::engine
