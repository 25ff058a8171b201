#pragma once
// How keys and values are stored, and how layers share block tables.

#include <cstdint>
#include <string_view>
#include <vector>

#include "backend/plan.h"

namespace nibble::backend {

enum class KvFormat { kF32, kF16 };

std::string_view to_string(KvFormat format);

// Positions in a page. Small enough that a sliding window wastes little, large enough that a page
// of one head is several cache lines.
inline constexpr uint32_t kKvPageTokens = 32;

// Where one layer lies in its group's pages. A page holds, per layer, keys
// [kv_heads, kKvPageTokens, head_dim] and then values of the same shape.
struct KvLayer {
  KvId cache;
  uint64_t key_offset;    // bytes from the page's start
  uint64_t value_offset;  // bytes from the page's start
};

// The layers with one window and one format: they share block tables and pages.
struct KvGroup {
  uint32_t window;  // 0: unbounded
  KvFormat format;
  std::vector<KvLayer> layers;
  uint64_t page_bytes;

  // Pages that hold `positions` tokens while up to `ubatch` more are appended in one step.
  uint64_t pages_for(uint64_t positions, uint32_t ubatch) const;
};

// Groups in the order in which their windows first appear in the plan; all with `format`.
std::vector<KvGroup> make_kv_groups(const Plan& plan, KvFormat format);

// Where a plan's cache is found: groups[group].layers[layer].
struct KvPlace {
  uint32_t group;
  uint32_t layer;
};
std::vector<KvPlace> kv_places(const Plan& plan, const std::vector<KvGroup>& groups);

}  // namespace nibble::backend
