#include "backend/kv_format.h"

#include <algorithm>

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble::backend {
namespace {

uint64_t element_bytes(KvFormat format) {
  return format == KvFormat::kF32 ? 4 : 2;
}

}  // namespace

std::string_view to_string(KvFormat format) {
  return format == KvFormat::kF32 ? "f32" : "f16";
}

uint64_t KvGroup::pages_for(uint64_t positions, uint32_t ubatch) const {
  uint64_t kept = positions;
  // A window that starts in the middle of a page keeps that whole page.
  if (window != 0) kept = std::min(positions, uint64_t{window} + ubatch + kKvPageTokens);
  return ceil_div(kept, uint64_t{kKvPageTokens});
}

std::vector<KvGroup> make_kv_groups(const Plan& plan, KvFormat format) {
  std::vector<KvGroup> groups;
  for (uint32_t i = 0; i < plan.caches.size(); ++i) {
    const KvCacheShape& shape = plan.caches[i];
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const KvGroup& g) { return g.window == shape.window; });
    if (group == groups.end()) {
      groups.push_back({.window = shape.window, .format = format, .layers = {}, .page_bytes = 0});
      group = groups.end() - 1;
    }
    const uint64_t half =
        uint64_t{shape.kv_heads} * shape.head_dim * kKvPageTokens * element_bytes(format);
    group->layers.push_back(
        {.cache = {i}, .key_offset = group->page_bytes, .value_offset = group->page_bytes + half});
    group->page_bytes += 2 * half;
  }
  return groups;
}

std::vector<KvPlace> kv_places(const Plan& plan, const std::vector<KvGroup>& groups) {
  std::vector<KvPlace> places(plan.caches.size());
  for (uint32_t g = 0; g < groups.size(); ++g) {
    for (uint32_t l = 0; l < groups[g].layers.size(); ++l) {
      places[groups[g].layers[l].cache.value] = {g, l};
    }
  }
  return places;
}

}  // namespace nibble::backend
