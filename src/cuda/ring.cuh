#pragma once
// A ring of slots in shared memory, filled by producers and emptied by consumers in the same order.

#include <cstdint>

namespace nibble::cuda {

// A place in a ring of kStages.
template <uint32_t kStages>
struct RingPlace {
  uint32_t slot = 0, round = 0;
  __device__ __forceinline__ void advance() {
    if (++slot == kStages) slot = 0, round ^= 1;
  }
};

}  // namespace nibble::cuda
