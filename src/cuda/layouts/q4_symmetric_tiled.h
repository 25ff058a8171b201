#pragma once
// Q4_0 in tiles. Format: docs/formats/cuda-tiles.md.

#include "cuda/layouts/q4_tiled.h"
#include "quant/q4_0.h"

namespace nibble::cuda {

struct CudaQ4SymmetricTiled {
  static constexpr std::string_view kName = "CudaQ4SymmetricTiled";
  static constexpr uint32_t kVersion = 1;
  static constexpr quant::QuantType kSource = quant::QuantType::kQ4_0;
  using Block = quant::BlockQ4_0;

  alignas(16) uint32_t quants[4][kLanes][4];  // as in CudaQ4Tiled
  uint16_t scales[2][kLanes][2];              // f16: [half][lane][group of 32]

  // Bit for bit what GGUF's dequantisation gives.
  NIBBLE_HOST_DEVICE float value(uint32_t row, uint32_t column) const {
    const TilePlace place = tile_place(row, column);
    const PairPlace pair = pair_place(place.column);
    const uint32_t word = quants[2 * place.half + pair.step / 4][place.lane][pair.step % 4];
    return multiply(float(int(word >> nibble_shift(pair) & 0xf) - 8),
                    half_bits_to_float(scales[place.half][place.lane][place.column / 32]));
  }

  // Writes what `lane` owns. `rows` are the tile's blocks of its two rows, null where there is no
  // row; `columns` of each row exist.
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2], uint32_t columns) {
    for (uint32_t half = 0; half < 2; ++half) {
      for (uint32_t group = 0; group < 2; ++group) {
        const uint32_t block = lane % 4 * 2 + group;
        const Block* source = rows[half] && 32 * block < columns ? rows[half] + block : nullptr;
        for (uint32_t step = 0; step < 4; ++step) {
          const auto bytes = StepBytes::load(source, &Block::quants, 8 * (step % 2));
          quants[2 * half + group][lane][step] = bytes.pairs<4>(4 * (step / 2));
        }
        scales[half][lane][group] = source ? load_u16<Block>(source->scale.bytes) : 0;
      }
    }
  }
};
static_assert(sizeof(CudaQ4SymmetricTiled) == kTileRows * 8 * sizeof(quant::BlockQ4_0));

}  // namespace nibble::cuda
