#include "backend/kv_format.h"

#include <gtest/gtest.h>

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
  const auto groups = make_kv_groups(mixed_plan(), KvFormat::kF16);
  ASSERT_EQ(groups.size(), 2u);
  EXPECT_EQ(groups[0].window, 128u);
  EXPECT_EQ(groups[1].window, 0u);
  EXPECT_EQ(groups[0].layers.size(), 3u);
  EXPECT_EQ(groups[1].layers.size(), 2u);
}

TEST(KvGroups, LayersLieOneBehindTheOtherInAPage) {
  for (const KvFormat format : {KvFormat::kF16, KvFormat::kF32}) {
    const uint64_t element = format == KvFormat::kF16 ? 2 : 4;
    for (const KvGroup& group : make_kv_groups(mixed_plan(), format)) {
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
  const auto groups = make_kv_groups(plan, KvFormat::kF16);
  const auto places = kv_places(plan, groups);
  ASSERT_EQ(places.size(), plan.caches.size());
  for (uint32_t i = 0; i < places.size(); ++i) {
    EXPECT_EQ(groups[places[i].group].layers[places[i].layer].cache, KvId{i});
    EXPECT_EQ(groups[places[i].group].window, plan.caches[i].window);
  }
}

TEST(KvGroups, AWindowBoundsThePages) {
  const auto groups = make_kv_groups(mixed_plan(), KvFormat::kF16);
  EXPECT_EQ(groups[1].pages_for(100'000, 512), 3125u);
  EXPECT_EQ(groups[1].pages_for(1, 512), 1u);
  EXPECT_EQ(groups[0].pages_for(100'000, 512), groups[0].pages_for(1'000'000, 512));
  EXPECT_GE(groups[0].pages_for(100'000, 512) * kKvPageTokens, 128u + 512u);
  EXPECT_EQ(groups[0].pages_for(33, 512), 2u);
}

}  // namespace
}  // namespace nibble::backend
