#include "reference/kv_rows.h"

#include "backend/kv_codec.h"
#include "base/error.h"

namespace nibble::reference {

using backend::kKvPageTokens;

KvRows::KvRows(backend::HostKvStore& store, const backend::KvSequence& sequence,
               backend::KvPlace place, const backend::Plan& plan)
    : store_(store),
      table_(sequence.table(place.group)),
      layer_(store.groups()[place.group].layers[place.layer]),
      shared_key_weight_(backend::shared_key_weight(plan, layer_.cache)),
      group_index_(place.group) {}

std::byte* KvRows::head(uint64_t part_offset, uint32_t kv_head, uint32_t position) const {
  const backend::PageId page = table_[position / kKvPageTokens];
  NIBBLE_CHECK(page != backend::kNoPage);
  return store_.page(group_index_, page) + part_offset + kv_head * layer_.row.head_bytes();
}

void KvRows::write(uint32_t kv_head, uint32_t position, std::span<const float> key,
                   std::span<const float> value) {
  std::byte* const keys = head(layer_.key_offset, kv_head, position);
  const uint32_t row = position % kKvPageTokens;
  if (!layer_.shared) {
    encode_kv_row(layer_.row, key, keys, row);
    encode_kv_row(layer_.row, value, head(layer_.value_offset, kv_head, position), row);
    return;
  }
  // Where both have a place, the value's number is stored.
  std::vector<float> shared(layer_.row.values);
  for (uint32_t d = 0; d < key.size(); ++d) {
    shared[layer_.shared->key_place(d)] = key[d];
    shared[layer_.shared->value_place(d)] = value[d];
  }
  encode_kv_row(layer_.row, shared, keys, row);
}

void KvRows::read(uint32_t kv_head, uint32_t position, std::span<float> key,
                  std::span<float> value) const {
  const std::byte* const keys = head(layer_.key_offset, kv_head, position);
  const uint32_t row = position % kKvPageTokens;
  if (!layer_.shared) {
    decode_kv_row(layer_.row, keys, row, key);
    decode_kv_row(layer_.row, head(layer_.value_offset, kv_head, position), row, value);
    return;
  }
  std::vector<float> shared(layer_.row.values);
  decode_kv_row(layer_.row, keys, row, shared);
  for (uint32_t d = 0; d < key.size(); ++d) {
    const uint32_t place = layer_.shared->key_place(d);
    const bool weighted = place >= layer_.shared->rope_dims && !shared_key_weight_.empty();
    key[d] = shared[place] * (weighted ? shared_key_weight_[d] : 1.0f);
    value[d] = shared[layer_.shared->value_place(d)];
  }
}

}  // namespace nibble::reference
