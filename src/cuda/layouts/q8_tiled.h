#pragma once
// Q8_0 in tiles. Format: docs/formats/cuda-tiles.md.

#include "cuda/layouts/tile.h"
#include "quant/q8_0.h"
#include "quant/quant_type.h"

namespace nibble::cuda {

struct CudaQ8Tiled {
  static constexpr std::string_view kName = "CudaQ8Tiled";
  static constexpr uint32_t kVersion = 1;
  static constexpr quant::QuantType kSource = quant::QuantType::kQ8_0;
  using Block = quant::BlockQ8_0;

  // Bytes, 128 above GGUF's: [4 * half + column / 16][lane][column % 16 / 4], column % 4 from the
  // lowest on.
  alignas(16) uint32_t quants[8][kLanes][4];
  uint16_t scales[2][kLanes][2];  // f16: [half][lane][group of 32]

  // Bit for bit what GGUF's dequantisation gives.
  NIBBLE_HOST_DEVICE float value(uint32_t row, uint32_t column) const {
    const TilePlace place = tile_place(row, column);
    const uint32_t four =
        quants[4 * place.half + place.column / 16][place.lane][place.column % 16 / 4];
    return multiply(float(int(four >> place.column % 4 * 8 & 0xff) - 128),
                    half_bits_to_float(scales[place.half][place.lane][place.column / 32]));
  }

  // Writes what `lane` owns. `rows` are the tile's blocks of its two rows, null where there is no
  // row; `columns` of each row exist.
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2], uint32_t columns) {
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t group = 0; group < 2; ++group) {
        const uint32_t block = lane % 4 * 2 + group;
        const Block* source = rows[half] && 32 * block < columns ? rows[half] + block : nullptr;
        for (uint32_t i = 0; i < 8; ++i) {
          const uint32_t four = source ? load_u32<Block>(&source->quants[4 * i]) : 0;
          quants[4 * half + 2 * group + i / 4][lane][i % 4] = four ^ kAdd128;
        }
        scales[half][lane][group] = source ? load_u16<Block>(source->scale.bytes) : 0;
      }
    }
  }
};
static_assert(sizeof(CudaQ8Tiled) == kTileRows * 8 * sizeof(quant::BlockQ8_0));

}  // namespace nibble::cuda
