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

  alignas(16) uint32_t quants[4][kLanes][4];  // bits 0-3, as in CudaQ4Tiled
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
      uint32_t high_words[2] = {};
      for (uint32_t step = 0; step < 4; ++step) {
        const auto low = StepBytes::load(rows[half], &Block::quants, 32 * (lane % 4) + 8 * step);
        const auto high = StepBytes::load(rows[half], &Block::high_bits, 8 * step);
        for (uint32_t group = 0; group < 2; ++group) {
          quants[2 * half + group][lane][step] = low.pairs<4>(4 * group);
          high_words[group] |= high.pairs<1>(lane % 4 * 2 + group) << 4 * step;
        }
      }
      for (uint32_t group = 0; group < 2; ++group)
        high_bits[lane][2 * half + group] = high_words[group];
    }
    scales.pack_lane(lane, rows);
  }
};
static_assert(sizeof(CudaQ5Tiled) == kTileRows * sizeof(quant::BlockQ5K));

}  // namespace nibble::cuda
