#include "reference/kv_rows.h"

#include <algorithm>
#include <cstring>

#include "base/error.h"
#include "base/half.h"

namespace nibble::reference {

using backend::kKvPageTokens;
using backend::KvFormat;

namespace {

size_t element_bytes(KvFormat format) {
  return format == KvFormat::kF32 ? 4 : 2;
}

void encode(KvFormat format, std::span<const float> values, std::byte* bytes) {
  if (format == KvFormat::kF32) {
    std::memcpy(bytes, values.data(), values.size_bytes());
    return;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t half = f32_to_f16(values[i]);
    std::memcpy(bytes + 2 * i, &half, 2);
  }
}

void decode(KvFormat format, const std::byte* bytes, std::span<float> values) {
  if (format == KvFormat::kF32) {
    std::memcpy(values.data(), bytes, values.size_bytes());
    return;
  }
  for (size_t i = 0; i < values.size(); ++i) {
    uint16_t half;
    std::memcpy(&half, bytes + 2 * i, 2);
    values[i] = f16_to_f32(half);
  }
}

}  // namespace

KvRows::KvRows(backend::HostKvStore& store, const backend::KvSequence& sequence,
               backend::KvPlace place, const backend::KvCacheShape& shape)
    : store_(store),
      table_(sequence.table(place.group)),
      group_(store.groups()[place.group]),
      layer_(group_.layers[place.layer]),
      group_index_(place.group),
      head_dim_(shape.head_dim) {}

std::byte* KvRows::row(uint64_t part_offset, uint32_t kv_head, uint32_t position) const {
  const backend::PageId page = table_[position / kKvPageTokens];
  NIBBLE_CHECK(page != backend::kNoPage);
  const uint64_t row = uint64_t{kv_head} * kKvPageTokens + position % kKvPageTokens;
  return store_.page(group_index_, page) + part_offset +
         row * head_dim_ * element_bytes(layer_.row.format);
}

void KvRows::write(uint32_t kv_head, uint32_t position, std::span<const float> key,
                   std::span<const float> value) {
  encode(layer_.row.format, key, row(layer_.key_offset, kv_head, position));
  encode(layer_.row.format, value, row(layer_.value_offset, kv_head, position));
}

void KvRows::read(uint32_t kv_head, uint32_t position, std::span<float> key,
                  std::span<float> value) const {
  decode(layer_.row.format, row(layer_.key_offset, kv_head, position), key);
  decode(layer_.row.format, row(layer_.value_offset, kv_head, position), value);
}

}  // namespace nibble::reference
