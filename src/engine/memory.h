#pragma once
// How much of a model fits: decided before anything is loaded.

#include <cstdint>
#include <string_view>
#include <vector>

#include "backend/kv_format.h"
#include "backend/plan.h"

namespace nibble::engine {

// States of its cache that a session keeps to go back to: the start of a turn and the end of its
// prompt.
inline constexpr uint32_t kMaxSnapshots = 2;

struct SizeRequest {
  backend::KvOptions kv;
  std::vector<backend::KvOptions> alternatives;  // for what a refusal proposes
  uint32_t context;                              // 0: as much as fits, up to the trained context
  uint32_t sessions;
  uint32_t ubatch;
  uint32_t snapshots = kMaxSnapshots;  // of each session
  std::string_view advice = "";        // what a refusal says at its end
};

struct Size {
  uint32_t context;                    // tokens of one session
  std::vector<uint32_t> max_kv_pages;  // per KV group: what all sessions and snapshots can need
};

// Throws Error(kOutOfMemory) with the bytes needed, `free_bytes` and what would fit.
Size fit(const backend::Plan& plan, const SizeRequest& request, uint64_t free_bytes);

}  // namespace nibble::engine
