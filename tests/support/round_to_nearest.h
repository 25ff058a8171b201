#pragma once
// The plain 4-bit format that KV formats are compared with.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <span>

#include "base/half.h"

namespace nibble::test {

// Rounds each value to the nearest of 16 steps, [-8, 7] times an f16 scale per `block` values: the
// value furthest from 0 divided by -8.
inline void round_to_nearest_4bit(std::span<float> row, size_t block) {
  for (; !row.empty(); row = row.subspan(std::min(block, row.size()))) {
    const std::span values = row.first(std::min(block, row.size()));
    const float furthest =
        *std::ranges::max_element(values, {}, [](float value) { return std::abs(value); });
    const float scale = f16_to_f32(f32_to_f16(furthest / -8));
    if (scale == 0) continue;
    for (float& value : values) {
      value = std::clamp(std::nearbyint(value / scale), -8.0f, 7.0f) * scale;
    }
  }
}

}  // namespace nibble::test
