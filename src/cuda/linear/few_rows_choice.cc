#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "cuda/linear/few_rows.h"

namespace nibble::cuda {
namespace {

using backend::WeightStorage;

// Measured: docs/measurements/decode.md.
constexpr uint64_t kEnoughTiles = 6;    // per warp of a wide block
constexpr uint32_t kPrefetchTiles = 1;  // more delays the stragglers of the kernel in front

constexpr uint32_t kLeastColumnTiles = 4;  // of a chunk: parts of the result are bytes, too

constexpr uint32_t kRuntimeBytes = 1024;  // of shared memory that every block costs besides its own

uint32_t ring_bytes(LayoutId layout, const RingShape& shape, WeightStorage storage) {
  return visit_layout(layout, [&](auto type) {
    return cuda::ring_bytes<typename decltype(type)::type>(shape.stages * shape.row_tiles, storage);
  });
}

uint32_t activation_bytes(uint32_t column_tiles, uint32_t rows) {
  return column_tiles * activation_stride(rows) *
         (kTileColumns * 2 + uint32_t(sizeof(ActivationMeans)));
}

// Of a block without its activations; ring: bytes of a warp's.
uint32_t block_bytes(const RingShape& shape, uint32_t ring, uint32_t token_tiles) {
  const uint32_t sums = shape.row_tiles * token_tiles * kLanes * uint32_t(sizeof(float) * 4);
  return shape.warps * (ring + shape.stages * 8 + sums) + 8;
}

}  // namespace

bool has_few_rows_kernel(LayoutId first, std::optional<LayoutId> second) {
  if (!second) return true;
  return *second == LayoutId::kQ6 && (first == LayoutId::kQ4 || first == LayoutId::kQ5);
}

uint32_t most_few_rows(const DeviceShape& device) {
  const uint32_t tokens = token_tiles_of(kMostRows);
  const RingShape shape = ring_shape(tile_bytes(LayoutId::kF16), true, tokens);  // the largest
  const uint32_t ring = ring_bytes(LayoutId::kF16, shape, WeightStorage::kPacked);
  const uint32_t least = block_bytes(shape, ring, tokens) +
                         activation_bytes(kLeastColumnTiles, kMostRows) + kRuntimeBytes;
  return device.shared_bytes_per_block >= least ? kMostRows : kMatrixTokens;
}

FewRowsLaunch choose_few_rows(const DeviceShape& device, LayoutId first, uint32_t first_rows,
                              std::optional<LayoutId> second, uint32_t second_rows,
                              uint32_t columns, uint32_t rows, WeightStorage storage) {
  const TileGrid grid(first_rows, columns);
  const uint64_t first_bytes = grid.tiles() * tile_bytes(first);
  const uint64_t second_bytes =
      second ? TileGrid(second_rows, columns).tiles() * tile_bytes(*second) : 0;
  const uint32_t largest = std::max(tile_bytes(first), second ? tile_bytes(*second) : 0);

  const uint32_t tokens = token_tiles_of(rows);
  FewRowsLaunch launch = {};
  // Takes the shape if it leaves room for some activations, with as few column chunks as can be.
  const auto fits = [&](bool wide, uint32_t blocks_per_multiprocessor) {
    const RingShape shape = ring_shape(largest, wide, tokens);
    const uint32_t room = device.shared_bytes_per_block / blocks_per_multiprocessor - kRuntimeBytes;
    const uint32_t ring = block_bytes(shape,
                                      std::max(ring_bytes(first, shape, storage),
                                               second ? ring_bytes(*second, shape, storage) : 0),
                                      tokens);
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
                                  ring_shape(largest, true, 1).warps;
  uint32_t blocks_per_multiprocessor = 1;
  if ((tokens > 1 || tiles_per_warp >= kEnoughTiles) && fits(true, 1)) {
    // More than half of the shared memory: were there room for one of the next kernel's blocks
    // beside it, those would pile up on the multiprocessors whose blocks end first.
    launch.shared_bytes =
        std::max(launch.shared_bytes, device.shared_bytes_per_block / 2 + 2 * kRuntimeBytes);
  } else if (tokens == 1 && fits(false, 2)) {
    blocks_per_multiprocessor = 2;
  } else if (tokens > 1 || !fits(false, 1)) {
    fail(ErrorCode::kUnsupported,
         "a block of this GPU has {} bytes of shared memory, too few for the matrix kernels",
         device.shared_bytes_per_block);
  }

  launch.parts = tokens == 1 ? 2 * launch.column_chunks : launch.column_chunks;

  const uint32_t together = ring_shape(largest, launch.wide, tokens).row_tiles;
  const auto most_blocks = [&](uint32_t row_tiles) {
    return (row_tiles + together - 1) / together * launch.column_chunks;
  };
  const uint32_t slots = std::max(device.multiprocessors * blocks_per_multiprocessor,
                                  launch.column_chunks * (second ? 2 : 1));
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
