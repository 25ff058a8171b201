#include "cuda/attention/attention_choice.h"

#include <algorithm>
#include <iterator>

namespace nibble::cuda {

AttentionLaunch choose_attention(const DeviceShape& device, MatrixUnit unit,
                                 const backend::AttentionShape& shape, uint32_t rows,
                                 uint32_t single_rows) {
  const uint32_t ratio = shape.query_heads / shape.kv_heads;
  const uint32_t column_groups = (ratio + kQueryColumns - 1) / kQueryColumns;
  const uint32_t blocks = single_rows * shape.kv_heads * column_groups;
  uint32_t tile = 0;
  while (tile + 1 < std::size(kMmaTiles) &&
         kMmaTiles[tile].shared_bytes(shape.head_dim) > device.shared_bytes_per_block)
    ++tile;
  return {rows, single_rows, blocks == 0 ? 1 : std::max(1u, device.multiprocessors / blocks), unit,
          tile};
}

uint64_t most_split_parts(uint32_t multiprocessors) {
  constexpr uint64_t kMostHeadDim = 512;
  return multiprocessors * kQueryColumns * (kMostHeadDim / kPartColumns);
}

uint64_t attention_workspace_bytes(const backend::AttentionShape& shape,
                                   const AttentionLaunch& launch) {
  constexpr uint32_t kTilesTogether = 4;  // the most that a kernel's cluster takes
  const uint32_t tokens = kTilesTogether * query_tile_tokens(shape);
  const uint64_t clusters = (launch.rows - launch.single_rows + tokens - 1) / tokens;
  return clusters * kTilesTogether * kQueryTile * shape.kv_width() * 2;
}

}  // namespace nibble::cuda
