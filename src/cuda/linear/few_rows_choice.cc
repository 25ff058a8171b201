#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "cuda/linear/few_rows.h"

namespace nibble::cuda {
namespace {

// Measured: docs/measurements/decode.md.
constexpr uint64_t kEnoughTiles = 6;    // per warp of a wide block
constexpr uint32_t kPrefetchTiles = 1;  // more delays the stragglers of the kernel in front

constexpr uint32_t kRuntimeBytes = 1024;  // of shared memory that every block costs besides its own

uint32_t ring_bytes(LayoutId layout, uint32_t stages, backend::WeightStorage storage) {
  return visit_layout(layout, [&](auto type) {
    return cuda::ring_bytes<typename decltype(type)::type>(stages, storage);
  });
}

uint32_t activation_bytes(uint32_t column_tiles, uint32_t rows) {
  return column_tiles * rows * (kTileColumns * 2 + uint32_t(sizeof(ActivationMeans)));
}

}  // namespace

bool has_few_rows_kernel(LayoutId first, std::optional<LayoutId> second) {
  if (!second) return true;
  return *second == LayoutId::kQ6 && (first == LayoutId::kQ4 || first == LayoutId::kQ5);
}

FewRowsLaunch choose_few_rows(const DeviceShape& device, LayoutId first, uint32_t first_rows,
                              std::optional<LayoutId> second, uint32_t second_rows,
                              uint32_t columns, uint32_t rows, backend::WeightStorage storage) {
  const TileGrid grid(first_rows, columns);
  const uint64_t first_bytes = grid.tiles() * tile_bytes(first);
  const uint64_t second_bytes =
      second ? TileGrid(second_rows, columns).tiles() * tile_bytes(*second) : 0;
  const uint32_t largest = std::max(tile_bytes(first), second ? tile_bytes(*second) : 0);

  FewRowsLaunch launch = {};
  // Takes the shape if it leaves room for some activations, with as few column chunks as can be.
  const auto fits = [&](bool wide, uint32_t blocks_per_multiprocessor) {
    const RingShape shape = ring_shape(largest, wide);
    const uint32_t room = device.shared_bytes_per_block / blocks_per_multiprocessor - kRuntimeBytes;
    const uint32_t tiles = std::max(ring_bytes(first, shape.stages, storage),
                                    second ? ring_bytes(*second, shape.stages, storage) : 0);
    const uint32_t ring =
        shape.warps * (tiles + shape.stages * 8 + kLanes * uint32_t(sizeof(float) * 4)) + 8;
    for (uint32_t chunks = 1; chunks <= grid.column_tiles; ++chunks) {
      const uint32_t column_tiles = (grid.column_tiles + chunks - 1) / chunks;
      const uint32_t bytes = ring + activation_bytes(column_tiles, rows);
      if (bytes > room) continue;
      launch.wide = wide;
      launch.column_chunks = chunks;
      launch.shared_bytes = bytes;
      return true;
    }
    return false;
  };
  // Wide blocks need enough tiles for each warp to get going.
  const uint64_t tiles_per_warp = (first_bytes + second_bytes) / largest / device.multiprocessors /
                                  ring_shape(largest, true).warps;
  uint32_t blocks_per_multiprocessor = 1;
  if (tiles_per_warp >= kEnoughTiles && fits(true, 1)) {
    // More than half of the shared memory: were there room for one of the next kernel's blocks
    // beside it, those would pile up on the multiprocessors whose blocks end first.
    launch.shared_bytes =
        std::max(launch.shared_bytes, device.shared_bytes_per_block / 2 + 2 * kRuntimeBytes);
  } else if (fits(false, 2)) {
    blocks_per_multiprocessor = 2;
  } else if (!fits(false, 1)) {
    fail(ErrorCode::kUnsupported,
         "a block of this GPU has {} bytes of shared memory, too few for the matrix kernels",
         device.shared_bytes_per_block);
  }

  const auto most_blocks = [&](uint32_t row_tiles) { return row_tiles * launch.column_chunks; };
  const uint32_t slots = device.multiprocessors * blocks_per_multiprocessor;
  launch.first_blocks = std::min(slots, most_blocks(grid.row_tiles));
  launch.blocks = launch.first_blocks;
  if (second) {
    const double part = double(first_bytes) / double(first_bytes + second_bytes);
    const uint32_t wanted = std::clamp(uint32_t(std::lround(slots * part)), launch.column_chunks,
                                       slots - launch.column_chunks);
    const uint32_t second_tiles = TileGrid(second_rows, columns).row_tiles;
    launch.first_blocks = std::min(wanted, most_blocks(grid.row_tiles));
    launch.blocks = launch.first_blocks + std::min(slots - wanted, most_blocks(second_tiles));
  }
  launch.prefetch_tiles = kPrefetchTiles;
  return launch;
}

}  // namespace nibble::cuda
