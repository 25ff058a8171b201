#pragma once
// The kernels of elementwise.h, written once and compiled by each elementwise_ISA.cc.

#include "cpu/elementwise/elementwise.h"
#include "cpu/simd.h"

namespace nibble::cpu {
namespace {

float sum_of_squares(const float* x, size_t width) {
  // Four chains: one addition a cycle instead of one per latency, and errors a quarter as long.
  constexpr size_t kChains = 4;
  SimdFloat chains[kChains];
  for (SimdFloat& chain : chains) chain = SimdFloat::all(0);
  size_t i = 0;
  for (; i + kChains * SimdFloat::kLanes <= width; i += kChains * SimdFloat::kLanes) {
    for (size_t c = 0; c < kChains; ++c) {
      const SimdFloat value = SimdFloat::load(x + i + c * SimdFloat::kLanes);
      chains[c] = multiply_add(value, value, chains[c]);
    }
  }
  float total = sum((chains[0] + chains[1]) + (chains[2] + chains[3]));
  for (; i < width; ++i) total += x[i] * x[i];
  return total;
}

void rms_norm(const float* x, const float* weight, size_t width, float epsilon, float* out) {
  const float mean = sum_of_squares(x, width) / float(width);
  const float scale = 1.0f / __builtin_sqrtf(mean + epsilon);
  if (weight == nullptr) {
    for_each_vector(width, [=](auto v, size_t i) {
      using V = decltype(v);
      (V::load(x + i) * V::all(scale)).store(out + i);
    });
  } else {
    for_each_vector(width, [=](auto v, size_t i) {
      using V = decltype(v);
      (V::load(x + i) * V::all(scale) * V::load(weight + i)).store(out + i);
    });
  }
}

void add_and_scale(const float* x, size_t width, float scale, float* out) {
  for_each_vector(width, [=](auto v, size_t i) {
    using V = decltype(v);
    ((V::load(out + i) + V::load(x + i)) * V::all(scale)).store(out + i);
  });
}

// gelu_tanh(x) = x/2 (1 + tanh(u)) = x / (1 + e^(-2u)), u = sqrt(2/pi) (x + 0.044715 x^3): this
// form loses nothing to cancellation where tanh(u) nears -1.
void gated_gelu(const float* gate, const float* up, size_t width, float* out) {
  for_each_vector(width, [=](auto v, size_t i) {
    using V = decltype(v);
    constexpr float kMinusTwoRootTwoOverPi = -1.5957691216057308f;
    const V x = V::load(gate + i);
    const V cubic = multiply_add(x * x, V::all(0.044715f * kMinusTwoRootTwoOverPi),
                                 V::all(kMinusTwoRootTwoOverPi));
    const V gelu = x / (V::all(1) + exponential(x * cubic));
    (gelu * V::load(up + i)).store(out + i);
  });
}

void rotate(const float* cosines, const float* sines, size_t half, float* x) {
  for_each_vector(half, [=](auto v, size_t i) {
    using V = decltype(v);
    const V first = V::load(x + i);
    const V second = V::load(x + half + i);
    const V cosine = V::load(cosines + i);
    const V sine = V::load(sines + i);
    (first * cosine - second * sine).store(x + i);
    multiply_add(first, sine, second * cosine).store(x + half + i);
  });
}

// Near zero Cephes' odd polynomial keeps the relative error within a few roundings; elsewhere
// 1 - 2 / (e^2y + 1) is as good.
template <class V>
inline V hyperbolic_tangent(V y) {
  const V square = y * y;
  V p = V::all(-5.70498872745e-3f);
  p = multiply_add(p, square, V::all(2.06390887954e-2f));
  p = multiply_add(p, square, V::all(-5.37397155531e-2f));
  p = multiply_add(p, square, V::all(1.33314422036e-1f));
  p = multiply_add(p, square, V::all(-3.33332819422e-1f));
  const V near_zero = multiply_add(p * square, y, y);
  const V elsewhere = V::all(1) - V::all(2) / (exponential(y + y) + V::all(1));
  return select_less(square, V::all(0.625f * 0.625f), near_zero, elsewhere);
}

void softcap(float cap, size_t width, float* x) {
  for_each_vector(width, [=](auto v, size_t i) {
    using V = decltype(v);
    (V::all(cap) * hyperbolic_tangent(V::load(x + i) / V::all(cap))).store(x + i);
  });
}

void scale(float factor, size_t width, float* x) {
  for_each_vector(width, [=](auto v, size_t i) {
    using V = decltype(v);
    (V::all(factor) * V::load(x + i)).store(x + i);
  });
}

void to_f16(const float* x, size_t width, uint16_t* out) {
  for_each_vector(width, [=](auto v, size_t i) { decltype(v)::load(x + i).store(out + i); });
}

constexpr ElementwiseKernels kElementwiseKernels{
    SimdFloat::kLanes, rms_norm, add_and_scale, gated_gelu, rotate, softcap, scale, to_f16};

}  // namespace
}  // namespace nibble::cpu
