#pragma once
// What tells one content from another: XXH3 in 128 bits. It finds damage, not forgery.

#define XXH_INLINE_ALL
#include <fmt/format.h>
#include <xxhash.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace nibble::engine {

// As XXH128 is written everywhere: the high half first, each half big-endian.
using ContentHash = std::array<uint8_t, 16>;

inline std::string to_hex(const ContentHash& hash) {
  return fmt::format("{:02x}", fmt::join(hash, ""));
}

class ContentHasher {
 public:
  ContentHasher() { XXH3_128bits_reset(&state_); }
  void update(std::span<const std::byte> bytes) {
    XXH3_128bits_update(&state_, bytes.data(), bytes.size());
  }
  ContentHash digest() const {
    XXH128_canonical_t canonical;
    XXH128_canonicalFromHash(&canonical, XXH3_128bits_digest(&state_));
    return std::to_array(canonical.digest);
  }

 private:
  XXH3_state_t state_;
};

inline ContentHash content_hash(std::span<const std::byte> bytes) {
  ContentHasher hasher;
  hasher.update(bytes);
  return hasher.digest();
}

}  // namespace nibble::engine
