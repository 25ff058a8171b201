#pragma once
// The 6-bit scales and minimums of Q4_K and Q5_K as their tiles hold them.

#include "cuda/layouts/tile.h"
#include "quant/k_scales.h"

namespace nibble::cuda {

// A lane owns two groups of 32 columns in each of two rows: 4 scales and 4 minimums of 6 bits. Both
// groups' numbers stand at the same bit of two streams of 24 bits: scale of row g in bits 0-5 and
// of row g + 8 in bits 6-11, minimum of row g in bits 12-17 and of row g + 8 in bits 18-23.
struct KScalesTiled {
  uint32_t low[kLanes];          // bits 0-15 of the first group's stream, then of the second's
  uint16_t high[kLanes];         // bits 16-23 of the first group's stream, then of the second's
  uint16_t block[kTileRows][2];  // f16: scale of the scales, scale of the minimums

  // What GGUF's dequantisation computes: value = scale * quant - min.
  NIBBLE_HOST_DEVICE float scale(uint32_t row, TilePlace place) const {
    return multiply(half_bits_to_float(block[row][0]), float(bits(place, 6 * place.half)));
  }
  NIBBLE_HOST_DEVICE float min(uint32_t row, TilePlace place) const {
    return multiply(half_bits_to_float(block[row][1]), float(bits(place, 12 + 6 * place.half)));
  }

  // `rows` are the blocks (BlockQ4K or BlockQ5K) of the lane's two rows, null where there is none.
  template <class Block>
  NIBBLE_HOST_DEVICE void pack_lane(uint32_t lane, const Block* const rows[2]) {
    uint32_t streams[2] = {0, 0};
    for (uint32_t half = 0; half < 2; ++half) {
      const Block* source = rows[half];
      for (uint32_t group = 0; source && group < 2; ++group) {
        const int g = int(lane % 4 * 2 + group);
        streams[group] |= uint32_t(source->scales.scale(g)) << (6 * half);
        streams[group] |= uint32_t(source->scales.min(g)) << (12 + 6 * half);
      }
      if (lane % 4 != 0) continue;
      const uint32_t row = lane / 4 + 8 * half;
      block[row][0] = source ? load_u16<Block>(source->scale.bytes) : 0;
      block[row][1] = source ? load_u16<Block>(source->min_scale.bytes) : 0;
    }
    low[lane] = (streams[0] & 0xffff) | streams[1] << 16;
    high[lane] = uint16_t(streams[0] >> 16 | streams[1] >> 16 << 8);
  }

 private:
  NIBBLE_HOST_DEVICE uint32_t bits(TilePlace place, uint32_t shift) const {
    const uint32_t group = place.column / 32;
    const uint32_t stream = (low[place.lane] >> (16 * group) & 0xffff) |
                            uint32_t(high[place.lane] >> (8 * group) & 0xff) << 16;
    return stream >> shift & 0x3f;
  }
};
static_assert(sizeof(KScalesTiled) == 256);

}  // namespace nibble::cuda
