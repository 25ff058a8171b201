#pragma once
// How much of a model fits: decided before anything is loaded.

#include <cstdint>
#include <string_view>
#include <vector>

#include "backend/kv_format.h"
#include "backend/plan.h"
#include "engine/engine.h"

namespace nibble::engine {

struct SizeRequest {
  backend::KvOptions kv;
  std::vector<backend::KvOptions> alternatives;  // for what a refusal proposes
  uint32_t context;                              // 0: as much as fits, up to the trained context
  uint32_t sessions;
  uint32_t ubatch;
  uint32_t snapshots;            // of each session, as far as memory has room
  std::string_view advice = "";  // what a refusal says at its end
};

struct Size {
  uint32_t context;                    // tokens of one session
  uint32_t snapshots;                  // of one session
  std::vector<uint32_t> max_kv_pages;  // per KV group: what all sessions and snapshots can need
};

// What the request takes once every session has filled `request.context`, which must be given, and
// keeps all its snapshots. Saturates.
MemoryNeeds needs_of(const backend::Plan& plan, const SizeRequest& request);

// Context before snapshots: those are given up, all sessions' alike, where memory would not serve
// the context asked for otherwise. Throws Error(kOutOfMemory) with the bytes needed, `free_bytes`
// and what would fit.
Size fit(const backend::Plan& plan, SizeRequest request, uint64_t free_bytes);

}  // namespace nibble::engine
