#pragma once
// Which keys a row sees, and how its blocks share them.

#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {

// Positions [first, position], in tiles of `tile` keys from `begin` on, the last multiple of
// `align` that is not behind `first`.
struct VisibleKeys {
  uint32_t first, begin, tiles;

  __device__ VisibleKeys(uint32_t position, uint32_t window, uint32_t align = 1,
                         uint32_t tile = kKeyTile) {
    const uint32_t count = window == 0 ? position + 1 : min(position + 1, window);
    first = position + 1 - count;
    begin = first - first % align;
    tiles = (position - begin) / tile + 1;
  }

  // Splits with tiles come first.
  __device__ uint32_t used_splits(uint32_t splits) const { return min(splits, tiles); }
  __device__ uint32_t split_begin(uint32_t split, uint32_t splits) const {
    return tiles / splits * split + min(split, tiles % splits);
  }
};

// A stored key or value, or a row that serves both.
struct KvRow {
  char* numbers;
  __half* scales;
};

// A head's row in a page. `offset`: the keys' or the values' of the layer.
__device__ __forceinline__ KvRow page_row(uint64_t page, const KvRows& kv, uint64_t offset,
                                          uint32_t kv_head, uint32_t position) {
  const uint32_t row = position % backend::kKvPageTokens;
  char* const head = reinterpret_cast<char*>(page) + offset + uint64_t(kv_head) * kv.head_bytes;
  char* const scales = head + backend::kKvPageTokens * kv.row_bytes;
  return {head + row * kv.row_bytes, reinterpret_cast<__half*>(scales) + row * kv.row_scales};
}

__device__ __forceinline__ const uint64_t* page_table(const AttentionArgs& step,
                                                      uint32_t sequence) {
  return step.tables.pages + uint64_t(sequence) * step.tables.stride;
}

}  // namespace nibble::cuda
