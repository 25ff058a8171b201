#pragma once
// All weight layouts of this room, and packing of whole matrices into them.

#include <cstddef>
#include <type_traits>

#include "cuda/layouts/f16_tiled.h"
#include "cuda/layouts/q4_symmetric_tiled.h"
#include "cuda/layouts/q4_tiled.h"
#include "cuda/layouts/q5_tiled.h"
#include "cuda/layouts/q6_tiled.h"
#include "cuda/layouts/q8_tiled.h"

namespace nibble::cuda {

enum class LayoutId : uint32_t { kQ4, kQ5, kQ6, kQ8, kQ4Symmetric, kF16, kBf16 };
inline constexpr uint32_t kLayoutCount = 7;

// Calls `visit(std::type_identity<Layout>())` with the layout's type.
template <class Visit>
decltype(auto) visit_layout(LayoutId id, Visit&& visit) {
  switch (id) {
    case LayoutId::kQ4:
      return visit(std::type_identity<CudaQ4Tiled>());
    case LayoutId::kQ5:
      return visit(std::type_identity<CudaQ5Tiled>());
    case LayoutId::kQ6:
      return visit(std::type_identity<CudaQ6Tiled>());
    case LayoutId::kQ8:
      return visit(std::type_identity<CudaQ8Tiled>());
    case LayoutId::kQ4Symmetric:
      return visit(std::type_identity<CudaQ4SymmetricTiled>());
    case LayoutId::kF16:
      return visit(std::type_identity<CudaF16Tiled>());
    case LayoutId::kBf16:
      break;
  }
  return visit(std::type_identity<CudaBf16Tiled>());
}

template <class Layout>
constexpr LayoutId layout_id() {
  constexpr quant::QuantType kSource = Layout::kSource;
  if (kSource == quant::QuantType::kQ4_K) return LayoutId::kQ4;
  if (kSource == quant::QuantType::kQ5_K) return LayoutId::kQ5;
  if (kSource == quant::QuantType::kQ6_K) return LayoutId::kQ6;
  if (kSource == quant::QuantType::kQ8_0) return LayoutId::kQ8;
  if (kSource == quant::QuantType::kQ4_0) return LayoutId::kQ4Symmetric;
  return kSource == quant::QuantType::kF16 ? LayoutId::kF16 : LayoutId::kBf16;
}

inline uint32_t tile_bytes(LayoutId id) {
  return visit_layout(
      id, [](auto layout) { return uint32_t(sizeof(typename decltype(layout)::type)); });
}

inline std::string_view layout_name(LayoutId id) {
  return visit_layout(id, [](auto layout) { return decltype(layout)::type::kName; });
}

inline uint32_t layout_version(LayoutId id) {
  return visit_layout(id, [](auto layout) { return decltype(layout)::type::kVersion; });
}

// How many tiles lie over and beside each other in a matrix of [rows, columns].
struct TileGrid {
  uint32_t row_tiles;
  uint32_t column_tiles;

  TileGrid(uint32_t rows, uint32_t columns)
      : row_tiles((rows + kTileRows - 1) / kTileRows),
        column_tiles((columns + kTileColumns - 1) / kTileColumns) {}
  uint64_t tiles() const { return uint64_t(row_tiles) * column_tiles; }
};

// One lane's part of tile `index` of a matrix of GGUF blocks [rows, columns / Block::kValues]; its
// row i is the blocks' row `row_ids[i]`, unless that is null.
template <class Layout>
NIBBLE_HOST_DEVICE inline void pack_tile_lane(const typename Layout::Block* blocks,
                                              const int32_t* row_ids, uint32_t rows,
                                              uint32_t columns, uint32_t column_tiles,
                                              uint64_t index, uint32_t lane, Layout& tile) {
  constexpr uint32_t kBlockValues = Layout::Block::kValues;
  const uint32_t first_row = uint32_t(index / column_tiles) * kTileRows;
  const uint32_t first_column = uint32_t(index % column_tiles) * kTileColumns;
  const typename Layout::Block* sources[2];
  for (uint32_t half = 0; half < 2; ++half) {
    const uint32_t row = first_row + lane / 4 + 8 * half;
    sources[half] = nullptr;
    if (row >= rows) continue;
    const uint64_t source_row = row_ids ? uint32_t(row_ids[row]) : row;
    sources[half] = blocks + (source_row * columns + first_column) / kBlockValues;
  }
  const uint32_t left = columns - first_column;
  tile.pack_lane(lane, sources, left < kTileColumns ? left : kTileColumns);
}

// Packs a matrix on the host: `blocks` [rows, columns] as the file has them, `tiles` as TileGrid
// says.
template <class Layout>
void pack_matrix(const typename Layout::Block* blocks, uint32_t rows, uint32_t columns,
                 Layout* tiles) {
  const TileGrid grid(rows, columns);
  for (uint64_t i = 0; i < grid.tiles(); ++i) {
    for (uint32_t lane = 0; lane < kLanes; ++lane)
      pack_tile_lane(blocks, nullptr, rows, columns, grid.column_tiles, i, lane, tiles[i]);
  }
}

}  // namespace nibble::cuda
