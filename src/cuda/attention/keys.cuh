#pragma once
// Which keys a row sees, and how its blocks share them.

#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {

// Positions [first, position], in tiles of kKeyTile that begin at `first`.
struct VisibleKeys {
  uint32_t first, tiles;

  __device__ VisibleKeys(uint32_t position, uint32_t window) {
    const uint32_t count = window == 0 ? position + 1 : min(position + 1, window);
    first = position + 1 - count;
    tiles = (count + kKeyTile - 1) / kKeyTile;
  }

  // Splits with tiles come first.
  __device__ uint32_t used_splits(uint32_t splits) const { return min(splits, tiles); }
  __device__ uint32_t split_begin(uint32_t split, uint32_t splits) const {
    return tiles / splits * split + min(split, tiles % splits);
  }
};

// A head's row of keys (or values) in a page. `offset` is the layer's.
__device__ __forceinline__ char* page_row(uint64_t page, uint64_t offset, uint32_t kv_head,
                                          uint32_t position, uint32_t row_bytes) {
  const uint32_t row = kv_head * backend::kKvPageTokens + position % backend::kKvPageTokens;
  return reinterpret_cast<char*>(page) + offset + uint64_t(row) * row_bytes;
}

__device__ __forceinline__ const uint64_t* page_table(const AttentionArgs& step,
                                                      uint32_t sequence) {
  return step.tables.pages + uint64_t(sequence) * step.tables.stride;
}

}  // namespace nibble::cuda
