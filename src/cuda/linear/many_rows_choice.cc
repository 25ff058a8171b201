#include <algorithm>

#include "cuda/linear/many_rows.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kMostSharing = 8;  // blocks a tile: one of them adds up what the others leave
constexpr uint32_t kMostChunks = 12;  // parts of the result, which its reader adds

// Tokens of a tile. Measured: docs/measurements/prefill.md.
uint32_t tile_tokens(MatrixUnit unit, uint32_t rows) {
  return unit == MatrixUnit::kMma || rows <= kStreamTokens ? kStreamTokens : 128;
}

ManyRowsLaunch make_launch(const DeviceShape& device, MatrixUnit unit, LayoutId layout,
                           uint32_t matrix_rows, uint32_t columns, uint32_t rows, uint32_t sharers,
                           uint32_t chunks) {
  ManyRowsLaunch launch = {};
  launch.unit = unit;
  launch.sharers = sharers;
  launch.tile_rows = many_rows_tile_rows(tile_bytes(layout), sharers);
  launch.tile_tokens = tile_tokens(unit, rows);
  launch.row_blocks = (matrix_rows + launch.tile_rows - 1) / launch.tile_rows;
  launch.column_chunks = chunks;
  launch.token_blocks = (rows + launch.tile_tokens - 1) / launch.tile_tokens;
  const uint32_t tiles = launch.tiles();
  if (unit == MatrixUnit::kMma) {
    launch.blocks = launch.whole_tiles = tiles;
    return launch;
  }
  const uint32_t slots = std::min(device.multiprocessors * sharers, kMostBlocksSharing);
  // Blocks at the same columns share activations in the L2 cache, so large products are cut at
  // their end only. Where weights are all that counts, a block takes them as they lie.
  launch.whole_tiles = launch.tile_tokens <= kStreamTokens ? 0 : tiles / slots * slots;
  const uint32_t parts = std::min(TileGrid(1, columns).column_tiles / chunks, kMostSharing);
  launch.sharing_blocks =
      uint32_t(std::min<uint64_t>(slots, uint64_t(tiles - launch.whole_tiles) * parts));
  launch.blocks = launch.whole_tiles > 0 ? slots : launch.sharing_blocks;
  return launch;
}

}  // namespace

std::vector<ManyRowsLaunch> many_rows_candidates(const DeviceShape& device, MatrixUnit unit,
                                                 LayoutId layout, uint32_t matrix_rows,
                                                 uint32_t columns, uint32_t rows) {
  const bool stream = unit == MatrixUnit::kWgmma && tile_tokens(unit, rows) <= kStreamTokens;
  const uint32_t column_tiles = TileGrid(1, columns).column_tiles;
  std::vector<ManyRowsLaunch> candidates;
  for (uint32_t sharers = 1; sharers <= (stream ? most_sharers(tile_bytes(layout)) : 1);
       ++sharers) {
    for (uint32_t chunks = 1; chunks <= (stream ? kMostChunks : 1); ++chunks) {
      if (column_tiles % chunks != 0) continue;
      candidates.push_back(
          make_launch(device, unit, layout, matrix_rows, columns, rows, sharers, chunks));
    }
  }
  return candidates;
}

std::span<const MeasuredChoice> measured_choices() {
  static constexpr MeasuredChoice kChoices[] = {
#include "cuda/linear/measured_choices.inc"
  };
  return kChoices;
}

ManyRowsLaunch choose_many_rows(const DeviceShape& device, MatrixUnit unit, LayoutId layout,
                                uint32_t matrix_rows, uint32_t columns, uint32_t rows,
                                bool in_parts) {
  const auto measured = [&](const ManyRowsLaunch& launch) {
    return std::ranges::any_of(measured_choices(), [&](const MeasuredChoice& choice) {
      return choice.multiprocessors == device.multiprocessors && choice.layout == layout &&
             choice.matrix_rows == matrix_rows && choice.columns == columns &&
             choice.sharers == launch.sharers && choice.column_chunks == launch.column_chunks;
    });
  };
  const bool streams = tile_tokens(unit, rows) <= kStreamTokens;
  ManyRowsLaunch best = {};
  for (const ManyRowsLaunch& launch :
       many_rows_candidates(device, unit, layout, matrix_rows, columns, rows)) {
    if (launch.column_chunks > 1 && !in_parts) continue;
    if (streams && measured(launch)) return launch;
    if (launch.column_chunks == 1 || launch.tiles() <= device.multiprocessors * launch.sharers)
      best = launch;
  }
  return best;
}

uint64_t many_rows_workspace_bytes(const DeviceShape& device) {
  constexpr uint64_t kTileFloats = 256 * 128;  // of the only block of a multiprocessor
  return kFlagBytes + device.multiprocessors * kTileFloats * sizeof(float);
}

}  // namespace nibble::cuda
