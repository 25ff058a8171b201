#pragma once
// The formulas of a plan's steps, one row or one head at a time, computed in double and rounded
// once at the end. Backends are tested against these.

#include <span>

#include "backend/plan.h"

namespace nibble::reference {

// Products and sums in double.
double dot(std::span<const float> a, std::span<const float> b);
double dot(std::span<const double> a, std::span<const double> b);

// output = input / sqrt(mean(input^2) + epsilon) * weight. May work in place.
void rms_norm(const backend::RmsNorm& norm, std::span<const float> input,  // [width]
              std::span<float> output);                                    // [width]

// Turns the pairs (d, d + head_dim / 2) of one head. The angle is a float product, as the models
// were trained with.
void rotate(const backend::Rope& rope, uint32_t position, std::span<float> head);  // [head_dim]

// softmax(scale * query keys^T) values of one query head over all the keys given, at least one.
void attend(std::span<const float> query,   // [head_dim]
            std::span<const float> keys,    // [positions, head_dim]
            std::span<const float> values,  // [positions, head_dim]
            float scale,
            std::span<float> output);  // [head_dim]

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
float gelu_tanh(float x);

// cap * tanh(x / cap); cap 0 leaves x as it is.
float softcap(float x, float cap);

}  // namespace nibble::reference
