#include "backend/kv_format.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <iterator>
#include <variant>

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble::backend {
namespace {

constexpr uint32_t kQ8Block = 32;
constexpr uint32_t kLeastTq4Block = 32;  // and what head sizes are multiples of
constexpr uint32_t kLargestTq4Block = 128;

// The head's numbers of pairs that turn, were it the first ones: one above the last that does.
uint32_t turning_pairs(const Rope& rope) {
  const auto last = std::find_if(rope.inverse_frequencies.rbegin(), rope.inverse_frequencies.rend(),
                                 [](float frequency) { return frequency != 0; });
  return uint32_t(rope.inverse_frequencies.rend() - last);
}

// Whether the step's keys are its values but for a weight and a rotation.
bool differ_by_weight_only(const NormQkvStep& step) {
  if (!step.value_is_key || step.key_norm.has_value() != step.value_norm.has_value()) return false;
  return !step.key_norm ||
         (step.value_norm->weight.empty() && step.key_norm->epsilon == step.value_norm->epsilon);
}

bool allows(uint32_t head_dim, KvFormat format) {
  return format == KvFormat::kF32 || format == KvFormat::kF16 || head_dim % kLeastTq4Block == 0;
}

// `rope_dims`: of a shared row, else 0.
KvRowLayout row_layout(KvFormat format, uint32_t head_dim, uint32_t rope_dims) {
  KvRowLayout row{.format = format, .values = head_dim + rope_dims, .block = 0};
  if (format == KvFormat::kF32 || format == KvFormat::kF16) return row;
  if (!allows(head_dim, format)) {
    fail(ErrorCode::kUnsupported,
         "KV format {} takes head sizes that are multiples of {}, and this model has one of {}; "
         "use f16",
         to_string(format), kLeastTq4Block, head_dim);
  }
  // The largest power of two that no part of the row cuts.
  const uint32_t divisor = uint32_t{1} << std::countr_zero(head_dim | rope_dims);
  row.block = format == KvFormat::kQ8 ? kQ8Block : std::min(divisor, kLargestTq4Block);
  return row;
}

}  // namespace

std::string_view to_string(KvFormat format) {
  constexpr std::string_view kNames[] = {"f32", "f16", "q8", "tq4"};
  static_assert(std::size(kNames) == std::size(kKvFormats));
  return kNames[size_t(format)];
}

std::optional<KvFormat> kv_format_of(std::string_view name) {
  for (const KvFormat format : kKvFormats) {
    if (to_string(format) == name) return format;
  }
  return std::nullopt;
}

uint32_t KvRowLayout::number_bytes() const {
  switch (format) {
    case KvFormat::kF32:
      return 4 * values;
    case KvFormat::kF16:
      return 2 * values;
    case KvFormat::kQ8:
      return values;
    case KvFormat::kTq4:
      return values / 2;
  }
  NIBBLE_CHECK(!"a format");
  return 0;
}

std::optional<SharedKvRow> shared_kv_row(const Plan& plan, KvId cache) {
  const uint32_t head_dim = plan.cache(cache).head_dim;
  if (!plan.cache(cache).value_is_key || head_dim % kLeastTq4Block != 0) return std::nullopt;
  uint32_t rope_dims = 0;
  for (const Step& any : plan.steps) {
    const auto* step = std::get_if<NormQkvStep>(&any);
    if (step == nullptr || step->cache != cache) continue;
    if (!differ_by_weight_only(*step)) return std::nullopt;
    const uint32_t turning = 2 * turning_pairs(step->rope);
    if (turning != 0) {
      rope_dims = std::max({rope_dims, std::bit_ceil(turning), kLeastTq4Block});
    }
  }
  if (rope_dims >= head_dim) return std::nullopt;
  return SharedKvRow{.head_dim = head_dim, .rope_dims = rope_dims};
}

std::span<const float> shared_key_weight(const Plan& plan, KvId cache) {
  for (const Step& any : plan.steps) {
    const auto* step = std::get_if<NormQkvStep>(&any);
    if (step != nullptr && step->cache == cache && step->key_norm) return step->key_norm->weight;
  }
  return {};
}

uint64_t KvGroup::pages_for(uint64_t positions, uint32_t ubatch) const {
  uint64_t kept = positions;
  // A window that starts in the middle of a page keeps that whole page.
  if (window != 0) kept = std::min(positions, uint64_t{window} + ubatch + kKvPageTokens);
  return ceil_div(kept, uint64_t{kKvPageTokens});
}

bool allows(const Plan& plan, KvFormat format) {
  return std::ranges::all_of(
      plan.caches, [&](const KvCacheShape& shape) { return allows(shape.head_dim, format); });
}

std::vector<KvGroup> make_kv_groups(const Plan& plan, const KvOptions& options) {
  std::vector<KvGroup> groups;
  for (uint32_t i = 0; i < plan.caches.size(); ++i) {
    const KvCacheShape& shape = plan.caches[i];
    auto group = std::find_if(groups.begin(), groups.end(),
                              [&](const KvGroup& g) { return g.window == shape.window; });
    if (group == groups.end()) {
      groups.push_back({.window = shape.window, .layers = {}, .page_bytes = 0});
      group = groups.end() - 1;
    }
    std::optional<SharedKvRow> shared;
    if (options.layout == KvLayout::kAuto) shared = shared_kv_row(plan, {i});
    KvLayer layer{.cache = {i},
                  .kv_heads = shape.kv_heads,
                  .row = row_layout(shape.window == 0 ? options.format : options.window_format,
                                    shape.head_dim, shared ? shared->rope_dims : 0),
                  .shared = shared,
                  .key_offset = group->page_bytes,
                  .value_offset = group->page_bytes};
    if (!shared) layer.value_offset += layer.kv_heads * layer.row.head_bytes();
    group->page_bytes += layer.bytes();
    group->layers.push_back(layer);
  }
  return groups;
}

std::string describe_kv(const std::vector<KvGroup>& groups) {
  std::string full, windows;
  for (const KvGroup& group : groups) {
    std::string& text = group.window == 0 ? full : windows;
    if (!text.empty() || group.layers.empty()) continue;
    const KvLayer& layer = group.layers.front();
    text = fmt::format("{}{}", to_string(layer.row.format), layer.shared ? " in shared rows" : "");
  }
  if (full.empty() || windows.empty() || full == windows) return full.empty() ? windows : full;
  return fmt::format("{}, {} in windows", full, windows);
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
