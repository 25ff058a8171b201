#pragma once
// Hashing for tables that are built from untrusted files and looked up millions of times.

#include <bit>
#include <cstdint>
#include <optional>
#include <random>
#include <string_view>
#include <vector>

namespace nibble::text {

// A multiply-and-fold hash under a secret drawn at construction, so that no file can be made to
// fill one bucket.
class SecretHash {
 public:
  SecretHash() {
    std::random_device random;
    for (uint64_t& secret : secrets_) secret = (uint64_t{random()} << 32 | random()) | 1;
  }

  uint64_t operator()(uint64_t value) const { return fold(value ^ secrets_[0], secrets_[1]); }

  uint64_t operator()(std::string_view text) const {
    uint64_t hash = (*this)(text.size());
    for (; text.size() > 8; text.remove_prefix(8)) hash = (*this)(hash ^ load(text.substr(0, 8)));
    return (*this)(hash ^ load(text));
  }

 private:
  static uint64_t fold(uint64_t a, uint64_t b) {
    const auto product = static_cast<unsigned __int128>(a) * b;
    return uint64_t(product) ^ uint64_t(product >> 64);
  }
  static uint64_t load(std::string_view at_most_8) {
    uint64_t value = 0;
    at_most_8.copy(reinterpret_cast<char*>(&value), sizeof(value));
    return value;
  }

  uint64_t secrets_[2];
};

// Finds positions in a sequence that the caller owns, by hash, with open addressing: one flat
// array, at most half full.
class FlatIndex {
 public:
  explicit FlatIndex(size_t capacity) : slots_(std::bit_ceil(2 * capacity + 2)) {}

  // Notes `position` unless an equal element is noted already. `same(p)`: whether the element at
  // position p equals the one in question. No more than `capacity` calls.
  template <class Same>
  void insert(uint64_t hash, uint32_t position, Same same) {
    Slot& slot = slots_[locate(hash, same)];
    if (slot.position == kFree) slot = {tag(hash), position};
  }

  template <class Same>
  std::optional<uint32_t> find(uint64_t hash, Same same) const {
    const Slot& slot = slots_[locate(hash, same)];
    if (slot.position == kFree) return std::nullopt;
    return slot.position;
  }

 private:
  static constexpr uint32_t kFree = UINT32_MAX;
  struct Slot {
    uint32_t tag = 0;  // saves most looks at elements that differ
    uint32_t position = kFree;
  };

  static uint32_t tag(uint64_t hash) { return uint32_t(hash >> 32); }

  template <class Same>
  size_t locate(uint64_t hash, Same same) const {
    const size_t mask = slots_.size() - 1;
    size_t i = hash & mask;
    while (slots_[i].position != kFree &&
           !(slots_[i].tag == tag(hash) && same(slots_[i].position))) {
      i = (i + 1) & mask;
    }
    return i;
  }

  std::vector<Slot> slots_;
};

}  // namespace nibble::text
