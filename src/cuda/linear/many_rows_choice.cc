#include <algorithm>
#include <cmath>

#include "cuda/linear/many_rows.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kMostSharing = 8;  // blocks a tile: one of them adds up what the others leave
constexpr uint32_t kMostChunks = 12;  // parts of the result, which its reader adds

// Tokens of a tile. Measured: docs/measurements/prefill.md.
uint32_t tile_tokens(MatrixUnit unit, uint32_t rows) {
  if (unit == MatrixUnit::kWgmma && rows <= kStreamTokens / 2) return kStreamTokens / 2;
  return unit == MatrixUnit::kMma || rows <= kStreamTokens ? kStreamTokens : 128;
}

// Whether weights are read once, each.
bool streams(MatrixUnit unit, uint32_t rows) {
  return unit == MatrixUnit::kWgmma && rows <= kStreamTokens;
}

// Blocks that the device has room for.
uint32_t slots_of(const DeviceShape& device, LayoutId layout, bool stream) {
  return std::min(device.multiprocessors * many_rows_sharers(tile_bytes(layout), stream),
                  kMostBlocksSharing);
}

ManyRowsLaunch make_launch(MatrixUnit unit, LayoutId layout, uint32_t matrix_rows, uint32_t columns,
                           uint32_t rows, uint32_t chunks, uint32_t slots) {
  ManyRowsLaunch launch = {};
  launch.unit = unit;
  launch.tile_tokens = tile_tokens(unit, rows);
  const bool stream = streams(unit, rows);
  launch.tile_rows = many_rows_tile_rows(tile_bytes(layout), stream);
  launch.row_blocks = (matrix_rows + launch.tile_rows - 1) / launch.tile_rows;
  launch.column_chunks = chunks;
  launch.depth = TileGrid(1, columns).column_tiles / chunks;
  launch.token_blocks = (rows + launch.tile_tokens - 1) / launch.tile_tokens;
  const uint32_t tiles = launch.tiles();
  if (unit == MatrixUnit::kMma) {
    launch.blocks = launch.whole_tiles = tiles;
    return launch;
  }
  // Blocks at the same columns share activations in the L2 cache, so large products are cut at
  // their end only. Where weights are all that counts, a block takes them as they lie.
  launch.whole_tiles = stream ? 0 : tiles / slots * slots;
  const uint32_t shared_tiles = tiles - launch.whole_tiles;
  launch.sharing_blocks = uint32_t(
      std::min<uint64_t>(slots, uint64_t(shared_tiles) * std::min(launch.depth, kMostSharing)));
  if (shared_tiles > 0) {
    launch.share = shared_tiles * launch.depth / launch.sharing_blocks;
    launch.longer_shares = shared_tiles * launch.depth % launch.sharing_blocks;
  }
  launch.blocks = launch.whole_tiles > 0 ? slots : launch.sharing_blocks;
  return launch;
}

}  // namespace

std::vector<ManyRowsLaunch> many_rows_candidates(const DeviceShape& device, MatrixUnit unit,
                                                 LayoutId layout, uint32_t matrix_rows,
                                                 uint32_t columns, uint32_t rows) {
  const uint32_t column_tiles = TileGrid(1, columns).column_tiles;
  const uint32_t slots = slots_of(device, layout, streams(unit, rows));
  std::vector<ManyRowsLaunch> candidates;
  for (uint32_t chunks = 1; chunks <= (streams(unit, rows) ? kMostChunks : 1); ++chunks) {
    if (column_tiles % chunks == 0)
      candidates.push_back(make_launch(unit, layout, matrix_rows, columns, rows, chunks, slots));
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
             choice.column_chunks == launch.column_chunks;
    });
  };
  const bool stream = streams(unit, rows);
  ManyRowsLaunch best = {};
  for (const ManyRowsLaunch& launch :
       many_rows_candidates(device, unit, layout, matrix_rows, columns, rows)) {
    if (launch.column_chunks > 1 && !in_parts) continue;
    if (stream && measured(launch)) return launch;
    if (launch.column_chunks == 1 || launch.tiles() <= slots_of(device, layout, stream))
      best = launch;
  }
  return best;
}

bool has_many_rows_kernel(MatrixUnit unit, LayoutId first, LayoutId second, uint32_t rows) {
  return streams(unit, rows) && has_few_rows_kernel(first, second);
}

ManyRowsLaunches choose_many_rows(const DeviceShape& device, LayoutId first, uint32_t first_rows,
                                  LayoutId second, uint32_t second_rows, uint32_t columns,
                                  uint32_t rows) {
  // What a tile takes: its bytes and its arithmetic, which is the same in every layout.
  const auto cost = [](LayoutId layout, uint32_t rows) {
    constexpr double kArithmeticBytes = 2500;
    return rows * (tile_bytes(layout) + kArithmeticBytes);
  };
  const double part =
      cost(first, first_rows) / (cost(first, first_rows) + cost(second, second_rows));
  const uint32_t slots = slots_of(device, first, true);
  const uint32_t first_slots = std::clamp(uint32_t(std::lround(slots * part)), 1u, slots - 1);
  ManyRowsLaunches launches = {
      make_launch(MatrixUnit::kWgmma, first, first_rows, columns, rows, 1, first_slots),
      make_launch(MatrixUnit::kWgmma, second, second_rows, columns, rows, 1, slots - first_slots)};
  launches.second.first_block = launches.first.blocks;
  return launches;
}

uint64_t many_rows_workspace_bytes(const DeviceShape& device) {
  constexpr uint64_t kTileFloats = 256 * 128;  // of the only block of a multiprocessor
  return kFlagBytes + device.multiprocessors * kTileFloats * sizeof(float);
}

}  // namespace nibble::cuda
