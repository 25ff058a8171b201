#include <algorithm>
#include <cmath>
#include <limits>

#include "cuda/sampling/sample.h"

namespace nibble::cuda {

void DeviceRequests::clear() {
  requests.clear();
  biases.clear();
  seen.clear();
}

void DeviceRequests::add(const backend::SampleRequest& request, uint32_t logits_row) {
  const backend::SamplingParams& params = *request.params;
  DeviceRequest device = {
      .temperature = params.temperature,
      .top_p = params.top_p,
      .least = params.min_p > 0 ? std::log(params.min_p) : -std::numeric_limits<float>::infinity(),
      .repetition_penalty = params.repetition_penalty,
      .presence_penalty = params.presence_penalty,
      .frequency_penalty = params.frequency_penalty,
      .top_k = params.top_k,
      .logits_row = logits_row,
      .first_bias = uint32_t(biases.size()),
      .biases = uint32_t(params.logit_bias.size()),
      .first_seen = uint32_t(seen.size()),
      .seen = 0,
      .seed = params.seed,
      .position = request.position};
  for (const auto& [token, bias] : params.logit_bias) biases.push_back({token.value, bias});
  std::stable_sort(biases.begin() + device.first_bias, biases.end(),
                   [](const TokenBias& a, const TokenBias& b) { return a.token < b.token; });

  const bool penalties = params.repetition_penalty != 1.0f || params.presence_penalty != 0.0f ||
                         params.frequency_penalty != 0.0f;
  if (penalties) {
    const size_t window = std::min<size_t>(request.recent.size(), params.penalty_window);
    std::vector<TokenId> recent(request.recent.end() - ptrdiff_t(window), request.recent.end());
    std::sort(recent.begin(), recent.end());
    for (const TokenId token : recent) {
      if (seen.size() == device.first_seen || seen.back().token != token.value)
        seen.push_back({token.value, 0});
      ++seen.back().count;
    }
    device.seen = uint32_t(seen.size()) - device.first_seen;
  }
  requests.push_back(device);
}

}  // namespace nibble::cuda
