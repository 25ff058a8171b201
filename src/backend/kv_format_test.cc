#include "backend/kv_format.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>

#include "base/error.h"

namespace nibble::backend {
namespace {

KvCacheShape cache(uint32_t heads, uint32_t dim, uint32_t window) {
  return {.kv_heads = heads, .head_dim = dim, .window = window, .value_is_key = false};
}

// Like Gemma 4: several sliding layers for each full one, with their own head sizes.
Plan mixed_plan() {
  Plan plan;
  plan.caches = {cache(4, 64, 128), cache(4, 64, 128), cache(2, 128, 0), cache(4, 64, 128),
                 cache(2, 128, 0)};
  return plan;
}

TEST(KvGroups, OnePerWindowInPlanOrder) {
  const auto groups = make_kv_groups(mixed_plan(), KvOptions{});
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].window, 128u);
  EXPECT_EQ(groups[1].window, 0u);
  EXPECT_EQ(groups[0].layers.size(), 3u);
  EXPECT_EQ(groups[1].layers.size(), 2u);
}

TEST(KvGroups, LayersLieOneBehindTheOtherInAPage) {
  for (const KvFormat format : {KvFormat::kF16, KvFormat::kF32}) {
    const uint64_t element = format == KvFormat::kF16 ? 2 : 4;
    for (const KvGroup& group : make_kv_groups(mixed_plan(), KvOptions::all(format))) {
      uint64_t end = 0;
      for (const KvLayer& layer : group.layers) {
        const uint64_t half = 4 * 64 * kKvPageTokens * element;  // 4 x 64 = 2 x 128
        EXPECT_EQ(layer.key_offset, end);
        EXPECT_EQ(layer.value_offset, end + half);
        end += 2 * half;
      }
      EXPECT_EQ(group.page_bytes, end);
    }
  }
}

TEST(KvGroups, EveryCacheIsFoundAtItsPlace) {
  const Plan plan = mixed_plan();
  const auto groups = make_kv_groups(plan, KvOptions{});
  const auto places = kv_places(plan, groups);
  ASSERT_EQ(places.size(), plan.caches.size());
  for (uint32_t i = 0; i < places.size(); ++i) {
    EXPECT_EQ(groups[places[i].group].layers[places[i].layer].cache, KvId{i});
    EXPECT_EQ(groups[places[i].group].window, plan.caches[i].window);
  }
}

TEST(KvGroups, AWindowBoundsThePages) {
  const auto groups = make_kv_groups(mixed_plan(), KvOptions{});
  EXPECT_EQ(groups[1].pages_for(100'000, 512), 3125u);
  EXPECT_EQ(groups[1].pages_for(1, 512), 1u);
  EXPECT_EQ(groups[0].pages_for(100'000, 512), groups[0].pages_for(1'000'000, 512));
  EXPECT_GE(groups[0].pages_for(100'000, 512) * kKvPageTokens, 128u + 512u);
  EXPECT_EQ(groups[0].pages_for(33, 512), 2u);
}

TEST(KvGroups, WindowLayersHaveTheirOwnFormat) {
  const auto groups =
      make_kv_groups(mixed_plan(), {.format = KvFormat::kTq4, .window_format = KvFormat::kQ8});
  for (const KvLayer& layer : groups[0].layers) EXPECT_EQ(layer.row.format, KvFormat::kQ8);
  for (const KvLayer& layer : groups[1].layers) EXPECT_EQ(layer.row.format, KvFormat::kTq4);
}

TEST(KvGroups, Description) {
  EXPECT_EQ(describe_kv(make_kv_groups(mixed_plan(), KvOptions{})), "f16");
  EXPECT_EQ(describe_kv(make_kv_groups(mixed_plan(), {.format = KvFormat::kQ8})),
            "q8, f16 in windows");
}

TEST(KvRowLayout, BytesOfEachFormat) {
  const auto head_bytes = [](KvFormat format, uint32_t head_dim) {
    Plan plan;
    plan.caches = {cache(1, head_dim, 0)};
    return make_kv_groups(plan, KvOptions::all(format))[0].layers[0].row.head_bytes();
  };
  EXPECT_EQ(head_bytes(KvFormat::kF32, 512), 32u * 2048);
  EXPECT_EQ(head_bytes(KvFormat::kF16, 512), 32u * 1024);
  EXPECT_EQ(head_bytes(KvFormat::kQ8, 512), 32u * (512 + 16 * 2));
  EXPECT_EQ(head_bytes(KvFormat::kTq4, 512), 32u * (256 + 4 * 2));
  EXPECT_EQ(head_bytes(KvFormat::kTq4, 256), 32u * (128 + 2 * 2));
  EXPECT_EQ(head_bytes(KvFormat::kTq4, 64), 32u * (32 + 2));
  EXPECT_EQ(head_bytes(KvFormat::kTq4, 96), 32u * (48 + 3 * 2));
}

TEST(KvRowLayout, HeadsThatBlocksDoNotFillAreRefused) {
  Plan plan;
  plan.caches = {cache(1, 40, 0)};
  for (const KvFormat format : {KvFormat::kQ8, KvFormat::kTq4}) {
    try {
      make_kv_groups(plan, KvOptions::all(format));
      FAIL();
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
      EXPECT_NE(std::string(error.what()).find("has one of 40"), std::string::npos) << error.what();
    }
  }
}

TEST(KvFormat, NamesAreReadBack) {
  for (const KvFormat format : kKvFormats) EXPECT_EQ(kv_format_of(to_string(format)), format);
  EXPECT_EQ(kv_format_of("q4"), std::nullopt);
}

// One K=V layer, of whose pairs the first `turning` turn.
Plan shared_plan(uint32_t head_dim, uint32_t turning) {
  Plan plan;
  plan.caches = {{.kv_heads = 2, .head_dim = head_dim, .window = 0, .value_is_key = true}};
  NormQkvStep step{};
  step.shape = {.query_heads = 4, .kv_heads = 2, .head_dim = head_dim};
  step.value_is_key = true;
  step.key_norm = RmsNorm{.weight = std::vector<float>(head_dim, 2), .epsilon = 1e-6f};
  step.value_norm = RmsNorm{.weight = {}, .epsilon = 1e-6f};
  step.rope.inverse_frequencies.assign(head_dim / 2, 0);
  std::fill_n(step.rope.inverse_frequencies.begin(), turning, 0.5f);
  step.cache = {0};
  plan.steps = {step};
  return plan;
}

KvLayer only_layer(const Plan& plan, KvFormat format) {
  const auto groups = make_kv_groups(plan, KvOptions::all(format, KvLayout::kAuto));
  EXPECT_EQ(groups[0].page_bytes, groups[0].layers[0].bytes());
  return groups[0].layers[0];
}

TEST(SharedKvRow, Gemma4s) {
  const Plan plan = shared_plan(512, 64);
  const SharedKvRow row = shared_kv_row(plan, {0}).value();
  EXPECT_EQ(row.rope_dims, 128u);
  EXPECT_EQ(row.values(), 640u);
  EXPECT_EQ(only_layer(plan, KvFormat::kF16).bytes(), 2u * 32 * 1280);
  EXPECT_EQ(only_layer(plan, KvFormat::kQ8).bytes(), 2u * 32 * (640 + 20 * 2));
  EXPECT_EQ(only_layer(plan, KvFormat::kTq4).bytes(), 2u * 32 * 330);
  EXPECT_EQ(only_layer(plan, KvFormat::kTq4).row.block, 128u);
  EXPECT_EQ(only_layer(shared_plan(128, 16), KvFormat::kTq4).row.block, 32u);
}

TEST(SharedKvRow, ThePairsThatTurnAreInARopeBlockOfAPowerOfTwo) {
  for (uint32_t head_dim = 64; head_dim <= 512; head_dim += 32) {
    for (uint32_t turning = 0; turning <= head_dim / 2; ++turning) {
      const auto row = shared_kv_row(shared_plan(head_dim, turning), {0});
      const uint32_t least = turning == 0 ? 0 : std::max(2 * turning, 32u);
      if (!row) {
        EXPECT_GT(2 * least, head_dim);  // or a smaller block would do
        continue;
      }
      EXPECT_GE(row->rope_dims, least);
      EXPECT_LT(row->rope_dims, std::max(2 * least, 1u));
      EXPECT_EQ(row->rope_dims & (row->rope_dims - 1), 0u);
    }
  }
}

TEST(SharedKvRow, PlacesAreAPermutationThatKeepsPairsTogether) {
  for (const SharedKvRow row :
       {SharedKvRow{512, 128}, SharedKvRow{128, 32}, SharedKvRow{96, 32}, SharedKvRow{256, 0}}) {
    std::vector<int> keys(row.values()), values(row.values());
    for (uint32_t d = 0; d < row.head_dim; ++d) {
      ++keys.at(row.key_place(d));
      ++values.at(row.value_place(d));
      const bool turns = d % (row.head_dim / 2) < row.rope_dims / 2;
      EXPECT_EQ(turns, row.key_place(d) < row.rope_dims);
      if (!turns) {
        EXPECT_EQ(row.key_place(d), row.value_place(d));
      } else if (d < row.head_dim / 2) {
        EXPECT_EQ(row.key_place(d + row.head_dim / 2), row.key_place(d) + row.rope_dims / 2);
        EXPECT_EQ(row.value_place(d), row.head_dim + row.key_place(d));
      }
    }
    for (uint32_t i = 0; i < row.values(); ++i) {
      EXPECT_EQ(keys[i], i < row.head_dim);
      EXPECT_EQ(values[i], i >= row.value_begin());
    }
  }
}

TEST(SharedKvRow, SplitWhereOneRowWouldNotDo) {
  EXPECT_FALSE(shared_kv_row(shared_plan(64, 32), {0}));   // all pairs turn: nothing is saved
  EXPECT_FALSE(shared_kv_row(shared_plan(128, 33), {0}));  // a block of 128 would
  EXPECT_FALSE(shared_kv_row(shared_plan(80, 8), {0}));    // no whole blocks
  const auto changed = [](auto change) {
    Plan plan = shared_plan(128, 16);
    change(std::get<NormQkvStep>(plan.steps[0]));
    return shared_kv_row(plan, {0});
  };
  EXPECT_TRUE(changed([](NormQkvStep&) {}));
  EXPECT_FALSE(changed([](NormQkvStep& s) { s.value_is_key = false; }));
  EXPECT_FALSE(changed([](NormQkvStep& s) { s.value_norm->weight.assign(128, 3); }));
  EXPECT_FALSE(changed([](NormQkvStep& s) { s.value_norm->epsilon = 1; }));
  EXPECT_FALSE(changed([](NormQkvStep& s) { s.value_norm.reset(); }));
  EXPECT_TRUE(changed([](NormQkvStep& s) { s.key_norm.reset(), s.value_norm.reset(); }));
}

TEST(SharedKvRow, SplitLayoutIsRespected) {
  const auto groups = make_kv_groups(shared_plan(512, 64), KvOptions::all(KvFormat::kF16));
  EXPECT_FALSE(groups[0].layers[0].shared);
  EXPECT_EQ(groups[0].page_bytes, 2u * 2 * 32 * 1024);
}

}  // namespace
}  // namespace nibble::backend
