#pragma once
// The draw of the next token on the device: backend/sampling.h, where the logits are.

#include <cuda_runtime_api.h>

#include <cstdint>
#include <vector>

#include "backend/sampling.h"

namespace nibble::cuda {

struct TokenBias {
  int32_t token;
  float bias;
};
struct TokenCount {
  int32_t token;
  uint32_t count;  // among the recent tokens
};

// One backend::SampleRequest as the kernel reads it.
struct DeviceRequest {
  float temperature;
  float top_p;
  float least;  // log(min_p), or minus infinity
  float repetition_penalty, presence_penalty, frequency_penalty;
  uint32_t top_k;
  uint32_t logits_row;
  uint32_t first_bias, biases;  // entries of SampleArgs::biases
  uint32_t first_seen, seen;    // entries of SampleArgs::seen
  uint64_t seed, position;
};

// Requests of one step, with their lists.
struct DeviceRequests {
  std::vector<DeviceRequest> requests;
  std::vector<TokenBias> biases;  // of each request by token, in their order where it is one token
  std::vector<TokenCount> seen;   // of each request by token; empty when penalties are off

  void clear();
  void add(const backend::SampleRequest& request, uint32_t logits_row);
};

struct SampleArgs {
  const DeviceRequest* requests;  // [count]
  uint32_t count;
  const TokenBias* biases;
  const TokenCount* seen;
  float* logits;  // [rows, vocabulary], changed
  uint32_t vocabulary;
  int32_t* tokens;  // [count]
};
// Same order and choices as backend::sample; weights of the nucleus are sums of multiples of
// 2^-40, so a token at its very edge may fall on the other side.
void launch_sample(cudaStream_t stream, const SampleArgs& args);

}  // namespace nibble::cuda
