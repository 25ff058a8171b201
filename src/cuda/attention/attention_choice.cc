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

AttentionWorkspace attention_workspace(const backend::AttentionShape& shape,
                                       const AttentionLaunch& launch) {
  constexpr uint64_t kAlign = 256;
  const auto aligned = [](uint64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; };
  const uint64_t parts = uint64_t(launch.single_rows) * shape.query_heads * launch.splits;
  AttentionWorkspace at;
  at.statistics = 0;
  at.partials = aligned(parts * 8);
  at.queries = at.partials + aligned(parts * shape.head_dim * 4);
  at.bytes = at.queries + uint64_t(launch.rows - launch.single_rows) * shape.query_width() * 2;
  return at;
}

}  // namespace nibble::cuda
