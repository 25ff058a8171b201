#pragma once
// The numbers of KV format tq4, the same for every backend: docs/formats/kv-tq4.md.
// TurboQuant (Zandieh et al., arXiv 2504.19874, sections 3.1 and 4) without its QJL stage.

#include <cstdint>
#include <span>

namespace nibble::backend {

// Magnitudes of the codebook, as f16: Lloyd-Max for 16 levels, in units of the block's root mean
// square, of a coordinate of a random point on the sphere in 128 dimensions.
inline constexpr uint16_t kTq4Magnitudes[8] = {0x3018, 0x362f, 0x393b, 0x3b7f,
                                               0x3cfe, 0x3e6b, 0x4018, 0x4161};
// |u| takes the magnitude whose index is the number of boundaries that it reaches: halfway between
// the magnitudes, exactly.
inline constexpr float kTq4Boundaries[7] = {0.2572021484375f, 0.5201416015625f, 0.79541015625f,
                                            1.092529296875f,  1.42626953125f,   1.82568359375f,
                                            2.3681640625f};

// Which values change their sign before the transform: value i of a block where bit i % 32 of word
// i / 32 is set. The first 128 bits of pi's fraction, so nobody chose them.
inline constexpr uint32_t kTq4Signs[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};

// Eight values are a word of 32 bits. Value i's magnitude is bits [4 i, 4 i + 3); its sign (1:
// negative) lies in the bits between, those of values 0 to 3 and of 4 to 7 a byte apart each.
constexpr uint32_t tq4_magnitude_shift(uint32_t i) {
  return 4 * i;
}
constexpr uint32_t tq4_sign_shift(uint32_t i) {
  return i < 4 ? 8 * i + 7 : 8 * (i - 4) + 3;
}

// block = H D block: signs, then the Walsh-Hadamard transform in natural order, divided by the
// square root of its size, a power of two of at most 128. Orthogonal.
void tq4_rotate(std::span<float> block);
// The inverse: block = D H block.
void tq4_rotate_back(std::span<float> block);

}  // namespace nibble::backend
