#include "cuda/layouts/pack.h"
#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kWarps = 4;

// One warp packs one tile, each lane what it owns: reads are bytes of a few lines that stay in the
// L1 cache, and the copy from the host is slower than this anyway.
template <class Layout>
__global__ void pack_kernel(const typename Layout::Block* blocks, const int32_t* row_ids,
                            uint32_t rows, uint32_t columns, uint32_t column_tiles, uint64_t tiles,
                            Layout* packed) {
  const uint64_t tile = uint64_t(blockIdx.x) * kWarps + threadIdx.x / kLanes;
  if (tile >= tiles) return;
  pack_tile_lane(blocks, row_ids, rows, columns, column_tiles, tile, threadIdx.x % kLanes,
                 packed[tile]);
}

}  // namespace

void pack_rows_on_device(cudaStream_t stream, LayoutId layout, const void* blocks,
                         const int32_t* row_ids, uint32_t rows, uint32_t columns, void* tiles) {
  const TileGrid grid(rows, columns);
  visit_layout(layout, [&](auto id) {
    using Layout = typename decltype(id)::type;
    pack_kernel<<<uint32_t((grid.tiles() + kWarps - 1) / kWarps), kWarps * kLanes, 0, stream>>>(
        static_cast<const typename Layout::Block*>(blocks), row_ids, rows, columns,
        grid.column_tiles, grid.tiles(), static_cast<Layout*>(tiles));
  });
  NIBBLE_CUDA(cudaGetLastError());
}

void pack_on_device(cudaStream_t stream, LayoutId layout, const void* blocks, uint32_t block_rows,
                    uint32_t columns, uint32_t first_row_tile, void* tiles) {
  const uint64_t first = uint64_t(first_row_tile) * TileGrid(block_rows, columns).column_tiles;
  pack_rows_on_device(stream, layout, blocks, nullptr, block_rows, columns,
                      static_cast<std::byte*>(tiles) + first * tile_bytes(layout));
}

}  // namespace nibble::cuda
