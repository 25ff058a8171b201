#pragma once
// F16 and BF16 in tiles. Format: docs/formats/cuda-tiles.md.

#include "cuda/layouts/tile.h"
#include "quant/floats.h"
#include "quant/quant_type.h"

namespace nibble::cuda {

// 16-bit numbers, as they are: [8 * half + column / 8][lane][column % 8].
template <class SourceBlock, quant::QuantType kType>
struct CudaHalfTiled {
  static constexpr std::string_view kName =
      kType == quant::QuantType::kF16 ? "CudaF16Tiled" : "CudaBf16Tiled";
  static constexpr uint32_t kVersion = 1;
  static constexpr quant::QuantType kSource = kType;
  using Block = SourceBlock;

  alignas(16) uint16_t values[16][kLanes][8];

  NIBBLE_HOST_DEVICE float value(uint32_t row, uint32_t column) const {
    const TilePlace place = tile_place(row, column);
    const uint16_t bits = values[8 * place.half + place.column / 8][place.lane][place.column % 8];
    if constexpr (kType == quant::QuantType::kF16) return half_bits_to_float(bits);
    const uint32_t widened = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &widened, sizeof value);
    return value;
  }

  // Writes what `lane` owns. `rows` are the tile's blocks of its two rows, null where there is no
  // row; `columns` of each row exist.
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2], uint32_t columns) {
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t i = 0; i < kLaneColumns; ++i) {
        const uint32_t column = lane % 4 * kLaneColumns + i;
        values[8 * half + i / 8][lane][i % 8] = rows[half] && column < columns
                                                    ? load_u16<Block>(rows[half][column].bytes)
                                                    : uint16_t{0};
      }
    }
  }
};
using CudaF16Tiled = CudaHalfTiled<quant::BlockF16, quant::QuantType::kF16>;
using CudaBf16Tiled = CudaHalfTiled<quant::BlockBF16, quant::QuantType::kBF16>;
static_assert(sizeof(CudaF16Tiled) == kTileRows * kTileColumns * 2);
static_assert(sizeof(CudaBf16Tiled) == kTileRows * kTileColumns * 2);

}  // namespace nibble::cuda
