#pragma once
// Matrix times 1 to 32 activation rows, at the speed of the memory that the weights lie in.

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <optional>

#include "backend/plan.h"
#include "cuda/device_shape.h"
#include "cuda/layouts/activations.h"
#include "cuda/layouts/layouts.h"

namespace nibble::cuda {

// Rows of a weight in one layout.
struct WeightRows {
  const void* data = nullptr;  // Layout[row tiles][column tiles], unless row_bytes says otherwise
  uint32_t rows = 0;
  uint32_t first_output = 0;  // where their outputs stand in a row of the result
  // Other than 0: `data` are the file's blocks, so many bytes a row, and may be read up to the next
  // multiple of 16.
  uint64_t row_bytes = 0;
};

// A block's warps, and what each of them has in flight: `stages` times `row_tiles` tiles, one above
// the other. Wide blocks have their multiprocessor to themselves and stream best; narrow ones share
// it, two by two, and suit small matrices and small devices. Reading 32 activation rows from shared
// memory takes as long as the tile takes from the device's, so two tiles share them. Tuned in
// docs/measurements/decode.md and batches.md.
struct RingShape {
  uint32_t warps, stages, row_tiles;
};
constexpr RingShape ring_shape(uint32_t tile_bytes, bool wide, uint32_t token_tiles) {
  if (tile_bytes > 6000) return {wide ? 8u : 4u, 2, 1};
  if (!wide) return {8, 2, 1};
  if (token_tiles > 2) return {8, 2, 2};
  return {16, tile_bytes > (token_tiles > 1 ? 3000 : 4000) ? 2u : 3u, 1};
}

// Matrix instructions side by side that `rows` activation rows take: 1, 2 or 4.
constexpr uint32_t token_tiles_of(uint32_t rows) {
  return (activation_stride(rows) + kMatrixTokens - 1) / kMatrixTokens;
}

// Shared memory that a warp's ring of so many tiles takes. Blocks are copied 16 bytes at a time
// from multiples of 16, and one of the stages is the tile that they are packed into.
template <class Layout>
constexpr uint32_t block_piece_bytes() {  // of a tile's row
  constexpr uint32_t kMostSkew = 16 - std::gcd(uint32_t(sizeof(typename Layout::Block)), 16u);
  return (uint32_t(sizeof(Layout)) / kTileRows + kMostSkew + 15) / 16 * 16;
}
template <class Layout>
constexpr uint32_t ring_bytes(uint32_t stages, backend::WeightStorage storage) {
  if (storage == backend::WeightStorage::kPacked) return stages * uint32_t(sizeof(Layout));
  return uint32_t(sizeof(Layout)) + (stages - 1) * kTileRows * block_piece_bytes<Layout>();
}

// How a kernel is started, chosen from sizes alone.
struct FewRowsLaunch {
  bool wide;
  uint32_t blocks;          // in all
  uint32_t first_blocks;    // of them, those that work on the first layout's rows
  uint32_t column_chunks;   // so many groups of blocks share the columns, to hold fewer activations
  uint32_t prefetch_tiles;  // that a warp asks the L2 cache for at its start, past its stages
  uint32_t shared_bytes;
  uint32_t parts;  // of the result, to be added by its reader
};

// How many activation rows the device's shared memory has room for, beside the tiles in flight.
uint32_t most_few_rows(const DeviceShape& device);

// For a weight of `first_rows` rows in one layout and `second_rows` (or none) in another one, times
// `rows` activation rows. Blocks (kDirect) are for up to kMatrixTokens rows.
FewRowsLaunch choose_few_rows(const DeviceShape& device, LayoutId first, uint32_t first_rows,
                              std::optional<LayoutId> second, uint32_t second_rows,
                              uint32_t columns, uint32_t rows,
                              backend::WeightStorage storage = backend::WeightStorage::kPacked);

// Whether one kernel takes both layouts. Otherwise a weight that mixes them takes two.
bool has_few_rows_kernel(LayoutId first, std::optional<LayoutId> second);

// y = W x. The result comes in parts that the reader adds: one or two for each chunk of columns. A
// block works on a contiguous share of the tiles. With up to 8 rows a share may end within a row of
// tiles: the block that has the row's end writes its sums to the chunk's second part. So no block
// waits for another, and the order of additions is fixed. Of more rows a part is too large to be
// written for that: shares end with rows of tiles.
struct FewRowsArgs {
  WeightRows weights[2];  // of the kernel's two layouts; the second may be empty
  uint32_t column_tiles;
  uint32_t rows;                 // of activations, 1 to most_few_rows()
  const void* activations;       // f16, as in activations.h
  const ActivationMeans* means;  // [column tiles, activation_stride(rows)]
  float* output;                 // [parts, rows, output_stride]
  uint32_t output_stride;
};

}  // namespace nibble::cuda
