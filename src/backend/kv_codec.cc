#include "backend/kv_codec.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "backend/kv_tq4.h"
#include "base/error.h"
#include "base/half.h"

namespace nibble::backend {
namespace {

constexpr uint32_t kTq4WordValues = 8;

void store_f16(float value, std::byte* to) {
  const uint16_t half = f32_to_f16(value);
  std::memcpy(to, &half, sizeof half);
}

float load_f16(const std::byte* from) {
  uint16_t half;
  std::memcpy(&half, from, sizeof half);
  return f16_to_f32(half);
}

void encode_q8(std::span<const float> block, std::byte* numbers, std::byte* scale) {
  float largest = 0;
  for (const float value : block) {
    const float magnitude = std::abs(value);
    if (magnitude > largest || std::isnan(magnitude)) largest = magnitude;
  }
  store_f16(largest / 127, scale);
  const float stored = load_f16(scale);
  const float inverse = stored > 0 ? 1 / stored : 0;
  for (size_t i = 0; i < block.size(); ++i) {
    // Rounding the scale down may take the largest value beyond 127.
    const float scaled = std::clamp(block[i] * inverse, -127.0f, 127.0f);
    numbers[i] = std::byte(std::isnan(scaled) ? 0 : int8_t(std::nearbyint(scaled)));
  }
}

void decode_q8(const std::byte* numbers, const std::byte* scale, std::span<float> block) {
  const float stored = load_f16(scale);
  for (size_t i = 0; i < block.size(); ++i) block[i] = float(int8_t(numbers[i])) * stored;
}

void encode_tq4(std::span<const float> values, std::byte* numbers, std::byte* scale) {
  float block[128];
  const std::span<float> rotated = std::span(block).first(values.size());
  std::ranges::copy(values, rotated.begin());
  tq4_rotate(rotated);
  float squares = 0;
  for (const float value : rotated) squares += value * value;
  const float to_unit = squares > 0 ? std::sqrt(float(values.size()) / squares) : 0;

  float code_squares = 0;
  for (size_t first = 0; first < values.size(); first += kTq4WordValues) {
    uint32_t word = 0;
    for (uint32_t i = 0; i < kTq4WordValues; ++i) {
      const float unit = rotated[first + i] * to_unit;
      uint32_t index = 0;
      while (index < 7 && std::abs(unit) >= kTq4Boundaries[index]) ++index;
      const float magnitude = f16_to_f32(kTq4Magnitudes[index]);
      code_squares += magnitude * magnitude;
      word |= index << tq4_magnitude_shift(i);
      word |= uint32_t(std::signbit(unit)) << tq4_sign_shift(i);
    }
    std::memcpy(numbers + first / 2, &word, sizeof word);
  }
  // The norm correction: what is stored has the length of what was given.
  store_f16(std::sqrt(squares / code_squares), scale);
}

void decode_tq4(const std::byte* numbers, const std::byte* scale, std::span<float> block) {
  const float stored = load_f16(scale);
  for (size_t first = 0; first < block.size(); first += kTq4WordValues) {
    uint32_t word;
    std::memcpy(&word, numbers + first / 2, sizeof word);
    for (uint32_t i = 0; i < kTq4WordValues; ++i) {
      const float magnitude =
          stored * f16_to_f32(kTq4Magnitudes[word >> tq4_magnitude_shift(i) & 7]);
      block[first + i] = word >> tq4_sign_shift(i) & 1 ? -magnitude : magnitude;
    }
  }
  tq4_rotate_back(block);
}

void walsh_hadamard(std::span<float> block) {
  NIBBLE_CHECK(std::has_single_bit(block.size()) && block.size() <= 128);
  for (size_t stride = 1; stride < block.size(); stride *= 2) {
    for (size_t i = 0; i < block.size(); ++i) {
      if ((i & stride) != 0) continue;
      const float low = block[i], high = block[i + stride];
      block[i] = low + high;
      block[i + stride] = low - high;
    }
  }
  const float normal = 1 / std::sqrt(float(block.size()));
  for (float& value : block) value *= normal;
}

void change_signs(std::span<float> block) {
  for (size_t i = 0; i < block.size(); ++i) {
    if ((kTq4Signs[i / 32] >> i % 32 & 1) != 0) block[i] = -block[i];
  }
}

}  // namespace

void tq4_rotate(std::span<float> block) {
  change_signs(block);
  walsh_hadamard(block);
}

void tq4_rotate_back(std::span<float> block) {
  walsh_hadamard(block);
  change_signs(block);
}

void encode_kv_row(const KvRowLayout& layout, std::span<const float> values, std::byte* head,
                   uint32_t row) {
  NIBBLE_CHECK(values.size() == layout.values && row < kKvPageTokens);
  std::byte* numbers = head + uint64_t{row} * layout.number_bytes();
  std::byte* scales = head + layout.scales_offset() + uint64_t{row} * 2 * layout.scales();
  switch (layout.format) {
    case KvFormat::kF32:
      std::memcpy(numbers, values.data(), values.size_bytes());
      return;
    case KvFormat::kF16:
      for (size_t i = 0; i < values.size(); ++i) store_f16(values[i], numbers + 2 * i);
      return;
    case KvFormat::kQ8:
    case KvFormat::kTq4:
      break;
  }
  for (uint32_t i = 0; i < layout.scales(); ++i) {
    const std::span<const float> block = values.subspan(size_t{i} * layout.block, layout.block);
    if (layout.format == KvFormat::kQ8) {
      encode_q8(block, numbers + size_t{i} * layout.block, scales + 2 * i);
    } else {
      encode_tq4(block, numbers + size_t{i} * layout.block / 2, scales + 2 * i);
    }
  }
}

void decode_kv_row(const KvRowLayout& layout, const std::byte* head, uint32_t row,
                   std::span<float> values) {
  NIBBLE_CHECK(values.size() == layout.values && row < kKvPageTokens);
  const std::byte* numbers = head + uint64_t{row} * layout.number_bytes();
  const std::byte* scales = head + layout.scales_offset() + uint64_t{row} * 2 * layout.scales();
  switch (layout.format) {
    case KvFormat::kF32:
      std::memcpy(values.data(), numbers, values.size_bytes());
      return;
    case KvFormat::kF16:
      for (size_t i = 0; i < values.size(); ++i) values[i] = load_f16(numbers + 2 * i);
      return;
    case KvFormat::kQ8:
    case KvFormat::kTq4:
      break;
  }
  for (uint32_t i = 0; i < layout.scales(); ++i) {
    const std::span<float> block = values.subspan(size_t{i} * layout.block, layout.block);
    if (layout.format == KvFormat::kQ8) {
      decode_q8(numbers + size_t{i} * layout.block, scales + 2 * i, block);
    } else {
      decode_tq4(numbers + size_t{i} * layout.block / 2, scales + 2 * i, block);
    }
  }
}

}  // namespace nibble::backend
