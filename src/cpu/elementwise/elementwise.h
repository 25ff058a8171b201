#pragma once
// What happens to activations between the matrices, for one row or head at a time.

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"

namespace nibble::cpu {

// One instruction set's kernels. Rows may have any length and alignment; in-place use is allowed
// where a comment says so. NaN and infinity go through as the formulas say.
struct ElementwiseKernels {
  uint32_t lanes;  // floats in a vector, which shows a test what it got

  // out = x / sqrt(mean(x^2) + epsilon) * weight; nullptr means all ones. In place allowed.
  void (*rms_norm)(const float* x, const float* weight, size_t width, float epsilon, float* out);

  // out = (out + x) * scale
  void (*add_and_scale)(const float* x, size_t width, float scale, float* out);

  // out = gelu_tanh(gate) * up
  void (*gated_gelu)(const float* gate, const float* up, size_t width, float* out);

  // Turns the pairs (x[d], x[d + half]) by the angles whose cosines and sines are given. In place.
  void (*rotate)(const float* cosines, const float* sines, size_t half, float* x);

  // x = cap * tanh(x / cap), in place
  void (*softcap)(float cap, size_t width, float* x);

  // x = scale * x, in place
  void (*scale)(float scale, size_t width, float* x);

  // To nearest, ties to even.
  void (*to_f16)(const float* x, size_t width, uint16_t* out);
};

// `isa` must be one of available_isas().
const ElementwiseKernels& elementwise_kernels(Isa isa);

// Defined where they exist, one file each.
extern const ElementwiseKernels kElementwiseScalar;
extern const ElementwiseKernels kElementwiseAvx2;
extern const ElementwiseKernels kElementwiseAvx512;
extern const ElementwiseKernels kElementwiseNeon;

}  // namespace nibble::cpu
