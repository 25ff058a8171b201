#pragma once
// How keys and values are stored: docs/formats/kv-pages.md, and one document per format.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/plan.h"

namespace nibble::backend {

enum class KvFormat {
  kF32,
  kF16,
  kQ8,   // 8 bits, a scale per 32 values: docs/formats/kv-q8.md
  kTq4,  // TurboQuant, 4 bits: docs/formats/kv-tq4.md
};
inline constexpr KvFormat kKvFormats[] = {KvFormat::kF32, KvFormat::kF16, KvFormat::kQ8,
                                          KvFormat::kTq4};

std::string_view to_string(KvFormat format);  // "tq4"
std::optional<KvFormat> kv_format_of(std::string_view name);

enum class KvLayout {
  kAuto,   // one row for key and value where the model allows: docs/formats/kv-shared.md
  kSplit,  // a row for the key and one for the value everywhere
};

struct KvOptions {
  KvFormat format = KvFormat::kF16;         // of layers that see the whole context
  KvFormat window_format = KvFormat::kF16;  // of layers with a sliding window
  KvLayout layout = KvLayout::kSplit;

  // The same for all layers.
  static KvOptions all(KvFormat format, KvLayout layout = KvLayout::kSplit) {
    return {.format = format, .window_format = format, .layout = layout};
  }
};

// Positions in a page. Small enough that a sliding window wastes little, large enough that a page
// of one head is several cache lines.
inline constexpr uint32_t kKvPageTokens = 32;

// The rows of one head in a page, [kKvPageTokens, values]: first the numbers of all rows, then the
// f16 scales of all rows, [kKvPageTokens, scales]. Both parts are multiples of 64 bytes.
struct KvRowLayout {
  KvFormat format;
  uint32_t values;  // numbers in a row
  uint32_t block;   // values that share a scale, in tq4 also those that are turned together; or 0

  uint32_t number_bytes() const;  // of a row, without its scales
  uint32_t scales() const { return block == 0 ? 0 : values / block; }  // of a row
  uint64_t scales_offset() const { return uint64_t{kKvPageTokens} * number_bytes(); }
  uint64_t head_bytes() const { return scales_offset() + uint64_t{kKvPageTokens} * 2 * scales(); }
};

// One row that serves key and value of a K=V layer, exactly. Its values:
//   [0, rope_dims)                        the RoPE block as the key has it: key_norm applied,
//   turned [rope_dims, head_dim)                 all other dimensions as the value has them
//   [head_dim, head_dim + rope_dims)      the RoPE block as the value has it
// The key is values [0, head_dim) and the value is values [rope_dims, rope_dims + head_dim). Of the
// key's other dimensions key_norm's weight is left out: it goes into the query instead.
// The RoPE block is the first rope_dims / 2 pairs (d, d + head_dim / 2): those that turn, and as
// many others as make it a power of two of at least 32. In the row the block's pairs are
// (p, p + rope_dims / 2).
struct SharedKvRow {
  uint32_t head_dim;
  uint32_t rope_dims;  // 0: nothing turns, and the key is the value

  constexpr uint32_t values() const { return head_dim + rope_dims; }
  constexpr uint32_t value_begin() const { return rope_dims; }
  // Where the key has dimension d; the value has it value_place(d).
  constexpr uint32_t key_place(uint32_t d) const {
    const uint32_t half = head_dim / 2, rope_half = rope_dims / 2;
    const uint32_t upper = d < half ? 0 : 1, pair = d - upper * half;
    return pair < rope_half ? upper * rope_half + pair
                            : rope_dims + upper * (half - rope_half) + pair - rope_half;
  }
  constexpr uint32_t value_place(uint32_t d) const {
    const uint32_t place = key_place(d);
    return place < rope_dims ? head_dim + place : place;
  }
};

// The row that serves key and value of `cache`; nullopt where the model needs two, or where one
// would be no smaller than two.
std::optional<SharedKvRow> shared_kv_row(const Plan& plan, KvId cache);

// The weight of key_norm that a shared row leaves out of the key's places [rope_dims, head_dim);
// [head_dim], in the head's order; empty means all ones.
std::span<const float> shared_key_weight(const Plan& plan, KvId cache);

// One layer in its group's pages. A page holds, per layer, the keys' heads [kv_heads] one behind
// the other and then the values'; or the heads' shared rows once.
struct KvLayer {
  KvId cache;
  uint32_t kv_heads;
  KvRowLayout row;                    // of keys and of values, or of the shared row
  std::optional<SharedKvRow> shared;  // nullopt: split rows
  uint64_t key_offset;                // bytes from the page's start
  uint64_t value_offset;              // bytes from the page's start; key_offset where shared

  uint64_t bytes() const { return (shared ? 1 : 2) * kv_heads * row.head_bytes(); }  // in a page
};

// The layers with one window: they have one format and share block tables and pages.
struct KvGroup {
  uint32_t window;  // 0: unbounded
  std::vector<KvLayer> layers;
  uint64_t page_bytes;

  // Pages that hold `positions` tokens while up to `ubatch` more are appended in one step.
  uint64_t pages_for(uint64_t positions, uint32_t ubatch) const;
};

// Whether the model's head sizes allow the format: those with blocks take multiples of 32.
bool allows(const Plan& plan, KvFormat format);

// Groups in the order in which their windows first appear in the plan. Throws Error(kUnsupported)
// where the model does not allow a layer's format.
std::vector<KvGroup> make_kv_groups(const Plan& plan, const KvOptions& options);

// "tq4 in shared rows, f16 in windows"; "f16" where that is all.
std::string describe_kv(const std::vector<KvGroup>& groups);

// Where a plan's cache is found: groups[group].layers[layer].
struct KvPlace {
  uint32_t group;
  uint32_t layer;
};
std::vector<KvPlace> kv_places(const Plan& plan, const std::vector<KvGroup>& groups);

}  // namespace nibble::backend
