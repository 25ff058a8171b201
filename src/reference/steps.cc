#include "reference/steps.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <numeric>
#include <vector>

namespace nibble::reference {

namespace {

template <class Float>
double dot_in_double(std::span<const Float> a, std::span<const Float> b) {
  constexpr size_t kSums = 8;  // independent, so that compilers may keep them in vectors
  double sums[kSums] = {};
  size_t i = 0;
  for (; i + kSums <= a.size(); i += kSums) {
    for (size_t j = 0; j < kSums; ++j) sums[j] += double{a[i + j]} * double{b[i + j]};
  }
  for (; i < a.size(); ++i) sums[0] += double{a[i]} * double{b[i]};
  return std::accumulate(std::begin(sums), std::end(sums), 0.0);
}

}  // namespace

double dot(std::span<const float> a, std::span<const float> b) {
  return dot_in_double(a, b);
}
double dot(std::span<const double> a, std::span<const double> b) {
  return dot_in_double(a, b);
}

void rms_norm(const backend::RmsNorm& norm, std::span<const float> input, std::span<float> output) {
  const double mean_square = dot(input, input) / double(input.size());
  const double scale = 1.0 / std::sqrt(mean_square + double{norm.epsilon});
  for (size_t i = 0; i < input.size(); ++i) {
    output[i] = float(input[i] * scale * (norm.weight.empty() ? 1.0 : norm.weight[i]));
  }
}

void rotate(const backend::Rope& rope, uint32_t position, std::span<float> head) {
  const size_t half = head.size() / 2;
  for (size_t d = 0; d < half; ++d) {
    const float angle = float(position) * rope.inverse_frequencies[d];
    const double cosine = std::cos(double{angle});
    const double sine = std::sin(double{angle});
    const double low = head[d];
    const double high = head[d + half];
    head[d] = float(low * cosine - high * sine);
    head[d + half] = float(high * cosine + low * sine);
  }
}

void attend(std::span<const float> query, std::span<const float> keys,
            std::span<const float> values, float scale, std::span<float> output) {
  const size_t head_dim = query.size();
  const size_t positions = keys.size() / head_dim;
  std::vector<double> weights(positions);
  for (size_t p = 0; p < positions; ++p) {
    weights[p] = scale * dot(query, keys.subspan(p * head_dim, head_dim));
  }
  const double largest = *std::max_element(weights.begin(), weights.end());
  for (double& weight : weights) weight = std::exp(weight - largest);
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);

  std::vector<double> sums(head_dim, 0.0);
  for (size_t p = 0; p < positions; ++p) {
    for (size_t d = 0; d < head_dim; ++d) sums[d] += weights[p] * values[p * head_dim + d];
  }
  for (size_t d = 0; d < head_dim; ++d) output[d] = float(sums[d] / total);
}

float gelu_tanh(float value) {
  const double x = value;
  const double inner = std::sqrt(2.0 / std::numbers::pi) * (x + 0.044715 * x * x * x);
  return float(0.5 * x * (1.0 + std::tanh(inner)));
}

float softcap(float x, float cap) {
  return cap == 0 ? x : float(cap * std::tanh(double{x} / cap));
}

}  // namespace nibble::reference
