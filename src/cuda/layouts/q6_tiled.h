#pragma once
// Q6_K in tiles. Format: docs/formats/cuda-tiles.md.

#include "cuda/layouts/q4_tiled.h"
#include "quant/q6_k.h"

namespace nibble::cuda {

struct CudaQ6Tiled {
  static constexpr std::string_view kName = "CudaQ6Tiled";
  static constexpr uint32_t kVersion = 1;
  static constexpr quant::QuantType kSource = quant::QuantType::kQ6_K;
  using Block = quant::BlockQ6K;

  uint32_t low_bits[4][kLanes][4];  // bits 0-3, as in CudaQ4Tiled
  // Bits 4-5: [half][lane][step / 2], pair p of a step at bit 8 (step % 2) + 2 p of each half.
  uint32_t high_bits[2][kLanes][4];
  uint8_t scales[kLanes][2][4];      // [lane][half][group of 16], 128 above the block's scale
  uint16_t block_scales[kTileRows];  // f16

  NIBBLE_HOST_DEVICE static constexpr uint32_t high_shift(PairPlace place) {
    return place.step % 2 * 8 + 2 * place.pair + 16 * place.high;
  }

  NIBBLE_HOST_DEVICE int quant(TilePlace place) const {
    const PairPlace pair = pair_place(place.column);
    const uint32_t low = low_bits[2 * place.half + pair.step / 4][place.lane][pair.step % 4];
    const uint32_t high = high_bits[place.half][place.lane][pair.step / 2];
    return int((low >> nibble_shift(pair) & 0xf) | (high >> high_shift(pair) & 3) << 4) - 32;
  }

  // Bit for bit what GGUF's dequantisation gives.
  NIBBLE_HOST_DEVICE float value(uint32_t row, uint32_t column) const {
    const TilePlace place = tile_place(row, column);
    const int scale = int(scales[place.lane][place.half][place.column / 16]) - 128;
    return multiply(multiply(half_bits_to_float(block_scales[row]), float(scale)),
                    float(quant(place)));
  }

  // Writes what `lane` owns. `rows` are the tile's blocks of its two rows, null where there is no
  // row; `columns` of each row exist.
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2],
                                    uint32_t /*columns: a block has all*/) {
    for (uint32_t half = 0; half < 2; ++half) {
      uint32_t words[8] = {};
      uint32_t high_words[4] = {};
      for (uint32_t column = 0; rows[half] && column < kLaneColumns; ++column) {
        const uint32_t in_row = lane % 4 * kLaneColumns + column;
        const uint32_t part = in_row / 128;
        const uint32_t quarter = in_row % 128 / 32;
        const uint32_t low = rows[half]->low_bits[64 * part + 32 * (quarter % 2) + column % 32];
        const uint32_t high = rows[half]->high_bits[32 * part + column % 32];
        const PairPlace pair = pair_place(column);
        words[pair.step] |= (low >> (quarter / 2 * 4) & 0xf) << nibble_shift(pair);
        high_words[pair.step / 2] |= (high >> (2 * quarter) & 3) << high_shift(pair);
      }
      for (uint32_t step = 0; step < 8; ++step)
        low_bits[2 * half + step / 4][lane][step % 4] = words[step];
      for (uint32_t i = 0; i < 4; ++i) {
        high_bits[half][lane][i] = high_words[i];
        scales[lane][half][i] =
            uint8_t((rows[half] ? rows[half]->scales[lane % 4 * 4 + i] : 0) + 128);
      }
      if (lane % 4 == 0) {
        block_scales[lane / 4 + 8 * half] =
            rows[half] ? load_u16(rows[half]->scale.bytes) : uint16_t{0};
      }
    }
  }
};
static_assert(sizeof(CudaQ6Tiled) == kTileRows * sizeof(quant::BlockQ6K));

}  // namespace nibble::cuda
