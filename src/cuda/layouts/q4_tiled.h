#pragma once
// Q4_K in tiles. Format: docs/formats/cuda-tiles.md.

#include "cuda/layouts/k_scales_tiled.h"
#include "quant/q4_k.h"
#include "quant/quant_type.h"

namespace nibble::cuda {

// The 4 bits of pair p of a step stand at bit 4 p of each half of the step's word.
NIBBLE_HOST_DEVICE constexpr uint32_t nibble_shift(PairPlace place) {
  return 4 * place.pair + 16 * place.high;
}

struct CudaQ4Tiled {
  static constexpr std::string_view kName = "CudaQ4Tiled";
  static constexpr uint32_t kVersion = 1;
  static constexpr quant::QuantType kSource = quant::QuantType::kQ4_K;
  using Block = quant::BlockQ4K;

  alignas(16) uint32_t quants[4][kLanes][4];  // [2 * half + step / 4][lane][step % 4]
  KScalesTiled scales;

  NIBBLE_HOST_DEVICE uint32_t quant(TilePlace place) const {
    const PairPlace pair = pair_place(place.column);
    return quants[2 * place.half + pair.step / 4][place.lane][pair.step % 4] >> nibble_shift(pair) &
           0xf;
  }

  // Bit for bit what GGUF's dequantisation gives.
  NIBBLE_HOST_DEVICE float value(uint32_t row, uint32_t column) const {
    const TilePlace place = tile_place(row, column);
    return subtract(multiply(scales.scale(row, place), float(quant(place))),
                    scales.min(row, place));
  }

  // Writes what `lane` owns. `rows` are the tile's blocks of its two rows, null where there is no
  // row; `columns` of each row exist.
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2],
                                    uint32_t /*columns: a block has all*/) {
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t step = 0; step < 4; ++step) {
        const auto bytes = StepBytes::load(rows[half], &Block::quants, 32 * (lane % 4) + 8 * step);
        for (uint32_t group = 0; group < 2; ++group)
          quants[2 * half + group][lane][step] = bytes.pairs<4>(4 * group);
      }
    }
    scales.pack_lane(lane, rows);
  }
};
static_assert(sizeof(CudaQ4Tiled) == kTileRows * sizeof(quant::BlockQ4K));

}  // namespace nibble::cuda
