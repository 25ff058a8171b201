#pragma once
// What stored rows mean, plainly. Backends have their own, faster code; the reference and the tests
// use this.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>

#include "backend/kv_format.h"

namespace nibble::backend {

// Stores row `row` of the head that begins at `head`. Values that are not finite make the row's or
// their block's values not finite.
void encode_kv_row(const KvRowLayout& layout, std::span<const float> values,  // [layout.values]
                   std::byte* head, uint32_t row);

// The values that the stored row stands for; of tq4 after the transform is undone.
void decode_kv_row(const KvRowLayout& layout, const std::byte* head, uint32_t row,
                   std::span<float> values);  // [layout.values]

// Changes a row of keys, of values or of both before it is stored in a layer of that window: how
// tests try formats that no backend has.
using ChangeKvRow = std::function<void(uint32_t window, std::span<float> row)>;  // [layout.values]

}  // namespace nibble::backend
