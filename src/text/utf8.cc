#include "text/utf8.h"

#include <array>
#include <cstdint>

namespace nibble::text {
namespace {

// What a lead byte asks for. Only the second byte's range varies: it is what excludes overlong
// forms, surrogates and values above U+10FFFF.
struct Lead {
  size_t bytes;  // 0: can't begin a character
  uint8_t second_low, second_high;
};

Lead lead_of(uint8_t byte) {
  if (byte < 0x80) return {1, 0, 0};
  if (byte < 0xc2) return {0, 0, 0};
  if (byte < 0xe0) return {2, 0x80, 0xbf};
  if (byte < 0xf0) {
    return {3, uint8_t(byte == 0xe0 ? 0xa0 : 0x80), uint8_t(byte == 0xed ? 0x9f : 0xbf)};
  }
  if (byte < 0xf5) {
    return {4, uint8_t(byte == 0xf0 ? 0x90 : 0x80), uint8_t(byte == 0xf4 ? 0x8f : 0xbf)};
  }
  return {0, 0, 0};
}

// Everything above ASCII for which Python's str.isspace() is true.
constexpr auto kWideSpaces = std::to_array<std::string_view>({
    "\u0085", "\u00a0", "\u1680", "\u2000", "\u2001", "\u2002", "\u2003",
    "\u2004", "\u2005", "\u2006", "\u2007", "\u2008", "\u2009", "\u200a",
    "\u2028", "\u2029", "\u202f", "\u205f", "\u3000",
});

constexpr std::string_view kAsciiSpaces = "\t\n\v\f\r\x1c\x1d\x1e\x1f ";

// The bytes of the space that `text` starts (or ends) with, 0 when there is none.
template <class HasSpace>
size_t space_bytes(char edge, HasSpace has_space) {
  if (kAsciiSpaces.find(edge) != std::string_view::npos) return 1;
  for (std::string_view space : kWideSpaces) {
    if (has_space(space)) return space.size();
  }
  return 0;
}

}  // namespace

Utf8Unit first_unit(std::string_view text) {
  const Lead lead = lead_of(uint8_t(text[0]));
  if (lead.bytes == 0) return {Utf8::kBroken, 1};
  for (size_t i = 1; i < lead.bytes; ++i) {
    if (i == text.size()) return {Utf8::kUnfinished, i};
    const auto byte = uint8_t(text[i]);
    const uint8_t low = i == 1 ? lead.second_low : 0x80;
    const uint8_t high = i == 1 ? lead.second_high : 0xbf;
    if (byte < low || byte > high) return {Utf8::kBroken, i};
  }
  return {Utf8::kWhole, lead.bytes};
}

std::string_view trim(std::string_view text) {
  while (!text.empty()) {
    const size_t bytes =
        space_bytes(text.front(), [&](std::string_view space) { return text.starts_with(space); });
    if (bytes == 0) break;
    text.remove_prefix(bytes);
  }
  while (!text.empty()) {
    const size_t bytes =
        space_bytes(text.back(), [&](std::string_view space) { return text.ends_with(space); });
    if (bytes == 0) break;
    text.remove_suffix(bytes);
  }
  return text;
}

}  // namespace nibble::text
