#include <algorithm>

#include "cuda/linear/many_rows.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kMostSharing = 8;  // blocks a tile: one of them adds up what the others leave

// Tokens of a tile. Measured: docs/measurements/prefill.md.
uint32_t tile_tokens(MatrixUnit unit, uint32_t rows) {
  if (unit == MatrixUnit::kMma) return 64;
  for (const uint32_t tokens : {16u, 32u, 64u}) {
    if (rows <= tokens) return tokens;
  }
  return 128;
}

}  // namespace

ManyRowsLaunch choose_many_rows(const DeviceShape& device, MatrixUnit unit, LayoutId layout,
                                uint32_t matrix_rows, uint32_t columns, uint32_t rows) {
  ManyRowsLaunch launch = {};
  launch.unit = unit;
  launch.tile_rows = many_rows_tile_rows(tile_bytes(layout));
  launch.tile_tokens = tile_tokens(unit, rows);
  launch.row_blocks = (matrix_rows + launch.tile_rows - 1) / launch.tile_rows;
  launch.token_blocks = (rows + launch.tile_tokens - 1) / launch.tile_tokens;
  const uint32_t tiles = launch.tiles();
  if (unit == MatrixUnit::kMma) {
    launch.blocks = launch.whole_tiles = tiles;
    return launch;
  }
  const uint32_t slots = std::min(device.multiprocessors, kMostBlocksSharing);
  launch.whole_tiles = tiles / slots * slots;
  const uint32_t parts = std::min(TileGrid(1, columns).column_tiles, kMostSharing);
  launch.sharing_blocks =
      uint32_t(std::min<uint64_t>(slots, uint64_t(tiles - launch.whole_tiles) * parts));
  launch.blocks = launch.whole_tiles > 0 ? slots : launch.sharing_blocks;
  launch.workspace_bytes = kFlagBytes + uint64_t(launch.sharing_blocks) * launch.tile_rows *
                                            launch.tile_tokens * sizeof(float);
  return launch;
}

}  // namespace nibble::cuda
