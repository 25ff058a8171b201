#pragma once
// A Gemma 4 file small enough to build in a test: layers sliding, full (K=V), no tokenizer.

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "support/gguf_builder.h"

namespace nibble::test {

struct SmallGemma4 {
  uint32_t hidden = 32, ffn = 64, vocabulary = 48, query_heads = 4;
  std::vector<uint32_t> kv_heads = {2, 1};
  std::vector<bool> sliding = {true, false};
  uint32_t head_dim_sliding = 8, head_dim_full = 16, window = 8;
  quant::QuantType matrix_type = quant::QuantType::kF32;

  // Keys and tensors that the test leaves out or writes itself.
  std::set<std::string> omit = {};
};

// Weights are zero, norms one.
GgufBuilder small_gemma4(const SmallGemma4& shape = {});

}  // namespace nibble::test
