#pragma once
// Q5_K in tiles. Format: docs/formats/cuda-tiles.md.

#include "cuda/layouts/q4_tiled.h"
#include "quant/q5_k.h"

namespace nibble::cuda {

struct CudaQ5Tiled {
  static constexpr std::string_view kName = "CudaQ5Tiled";
  static constexpr uint32_t kVersion = 1;
  static constexpr quant::QuantType kSource = quant::QuantType::kQ5_K;
  using Block = quant::BlockQ5K;

  uint32_t quants[4][kLanes][4];  // bits 0-3, as in CudaQ4Tiled
  // Bit 4: [lane][2 * half + step / 4], pair p of a step at bit 4 (step % 4) + p of each half.
  uint32_t high_bits[kLanes][4];
  KScalesTiled scales;

  NIBBLE_HOST_DEVICE static constexpr uint32_t high_shift(PairPlace place) {
    return place.step % 4 * 4 + place.pair + 16 * place.high;
  }

  NIBBLE_HOST_DEVICE uint32_t quant(TilePlace place) const {
    const PairPlace pair = pair_place(place.column);
    const uint32_t part = 2 * place.half + pair.step / 4;
    return (quants[part][place.lane][pair.step % 4] >> nibble_shift(pair) & 0xf) |
           (high_bits[place.lane][part] >> high_shift(pair) & 1) << 4;
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
      uint32_t words[8] = {};
      uint32_t high_words[2] = {};
      for (uint32_t column = 0; rows[half] && column < kLaneColumns; ++column) {
        const uint32_t low = rows[half]->quants[32 * (lane % 4) + column % 32];
        const uint32_t high = rows[half]->high_bits[column % 32];
        const uint32_t group = lane % 4 * 2 + column / 32;
        const PairPlace pair = pair_place(column);
        words[pair.step] |= (low >> (column / 32 * 4) & 0xf) << nibble_shift(pair);
        high_words[pair.step / 4] |= (high >> group & 1) << high_shift(pair);
      }
      for (uint32_t step = 0; step < 8; ++step)
        quants[2 * half + step / 4][lane][step % 4] = words[step];
      high_bits[lane][2 * half] = high_words[0];
      high_bits[lane][2 * half + 1] = high_words[1];
    }
    scales.pack_lane(lane, rows);
  }
};
static_assert(sizeof(CudaQ5Tiled) == kTileRows * sizeof(quant::BlockQ5K));

}  // namespace nibble::cuda
