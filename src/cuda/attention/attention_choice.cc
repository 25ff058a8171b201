#include "cuda/attention/attention_choice.h"

#include <algorithm>

namespace nibble::cuda {

AttentionLaunch choose_attention(uint32_t multiprocessors, const backend::AttentionShape& shape,
                                 uint32_t rows, uint32_t single_rows) {
  const uint32_t ratio = shape.query_heads / shape.kv_heads;
  const uint32_t column_groups = (ratio + kQueryColumns - 1) / kQueryColumns;
  const uint32_t blocks = single_rows * shape.kv_heads * column_groups;
  return {rows, single_rows, blocks == 0 ? 1 : std::max(1u, multiprocessors / blocks)};
}

uint64_t most_split_parts(uint32_t multiprocessors) {
  constexpr uint64_t kMostHeadDim = 512;
  return multiprocessors * kQueryColumns * (kMostHeadDim / kPartColumns);
}

uint64_t attention_workspace_bytes(const backend::AttentionShape& shape,
                                   const AttentionLaunch& launch) {
  return uint64_t(launch.rows - launch.single_rows) * shape.query_width() * 2;
}

}  // namespace nibble::cuda
