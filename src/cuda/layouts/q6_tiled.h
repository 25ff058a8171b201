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

  alignas(16) uint32_t low_bits[4][kLanes][4];  // bits 0-3, as in CudaQ4Tiled
  // Bits 4-5: [half][lane][step / 2], pair p of a step at bit 8 (step % 2) + 2 p of each half.
  uint32_t high_bits[2][kLanes][4];
  // Bytes, 128 above the block's scales: [lane][half], groups of 16 from the lowest on.
  uint32_t scales[kLanes][2];
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
    const int scale = int(scales[place.lane][place.half] >> place.column / 16 * 8 & 0xff) - 128;
    return multiply(multiply(half_bits_to_float(block_scales[row]), float(scale)),
                    float(quant(place)));
  }

  // Writes what `lane` owns. `rows` are the tile's blocks of its two rows, null where there is no
  // row; `columns` of each row exist.
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2],
                                    uint32_t /*columns: a block has all*/) {
    for (uint32_t half = 0; half < 2; ++half) {
      const Block* const source = rows[half];
      for (uint32_t group = 0; group < 2; ++group) {
        const uint32_t part = lane % 4 / 2, quarter = lane % 2 * 2 + group;
        uint32_t high_words[2] = {};
        for (uint32_t step = 0; step < 4; ++step) {
          const auto low =
              StepBytes::load(source, &Block::low_bits, 64 * part + 32 * group + 8 * step);
          const auto high = StepBytes::load(source, &Block::high_bits, 32 * part + 8 * step);
          low_bits[2 * half + group][lane][step] = low.pairs<4>(quarter / 2 * 4);
          high_words[step / 2] |= high.pairs<2>(2 * quarter) << step % 2 * 8;
        }
        for (uint32_t i = 0; i < 2; ++i) high_bits[half][lane][2 * group + i] = high_words[i];
      }
      scales[lane][half] = (source ? load_u32<Block>(&source->scales[lane % 4 * 4]) : 0) ^ kAdd128;
      if (lane % 4 == 0)
        block_scales[lane / 4 + 8 * half] = source ? load_u16<Block>(source->scale.bytes) : 0;
    }
  }
};
static_assert(sizeof(CudaQ6Tiled) == kTileRows * sizeof(quant::BlockQ6K));

}  // namespace nibble::cuda
