#include "support/small_gemma4.h"

#include <functional>

namespace nibble::test {

GgufBuilder small_gemma4(const SmallGemma4& shape) {
  GgufBuilder file;
  const auto key = [&](const std::string& name, const std::function<void(std::string)>& write) {
    if (!shape.omit.contains(name)) write(name);
  };
  const auto u32 = [&](const std::string& name, uint32_t value) {
    key(name, [&](const std::string& k) { file.u32(k, value); });
  };
  const auto f32 = [&](const std::string& name, float value) {
    key(name, [&](const std::string& k) { file.f32(k, value); });
  };
  key("general.architecture", [&](const std::string& k) { file.string(k, "gemma4"); });
  u32("gemma4.block_count", uint32_t(shape.sliding.size()));
  u32("gemma4.context_length", 512);
  u32("gemma4.embedding_length", shape.hidden);
  u32("gemma4.feed_forward_length", shape.ffn);
  u32("gemma4.attention.head_count", shape.query_heads);
  key("gemma4.attention.head_count_kv",
      [&](const std::string& k) { file.u32_array(k, shape.kv_heads); });
  u32("gemma4.attention.key_length", shape.head_dim_full);
  u32("gemma4.attention.value_length", shape.head_dim_full);
  u32("gemma4.attention.key_length_swa", shape.head_dim_sliding);
  u32("gemma4.attention.value_length_swa", shape.head_dim_sliding);
  u32("gemma4.rope.dimension_count", shape.head_dim_full);
  u32("gemma4.rope.dimension_count_swa", shape.head_dim_sliding);
  f32("gemma4.rope.freq_base", 1e6f);
  f32("gemma4.rope.freq_base_swa", 1e4f);
  u32("gemma4.attention.sliding_window", shape.window);
  key("gemma4.attention.sliding_window_pattern",
      [&](const std::string& k) { file.bool_array(k, shape.sliding); });
  f32("gemma4.attention.layer_norm_rms_epsilon", 1e-6f);
  f32("gemma4.final_logit_softcapping", 30.0f);
  u32("gemma4.embedding_length_per_layer_input", 0);
  u32("gemma4.attention.shared_kv_layers", 0);
  key("tokenizer.ggml.model", [&](const std::string& k) { file.string(k, "no_vocab"); });

  const auto matrix = [&](const std::string& name, uint64_t columns, uint64_t rows) {
    if (!shape.omit.contains(name)) file.tensor(name, shape.matrix_type, {columns, rows});
  };
  const auto ones = [&](const std::string& name, uint64_t size) {
    if (!shape.omit.contains(name)) file.f32_tensor(name, {size}, std::vector<float>(size, 1.0f));
  };
  matrix("token_embd.weight", shape.hidden, shape.vocabulary);
  ones("output_norm.weight", shape.hidden);
  ones("rope_freqs.weight", shape.head_dim_full / 2);
  for (size_t i = 0; i < shape.sliding.size(); ++i) {
    const uint64_t head_dim = shape.sliding[i] ? shape.head_dim_sliding : shape.head_dim_full;
    const uint64_t query_width = shape.query_heads * head_dim;
    const uint64_t kv_width = shape.kv_heads[i] * head_dim;
    const std::string layer = "blk." + std::to_string(i) + ".";
    matrix(layer + "attn_q.weight", shape.hidden, query_width);
    matrix(layer + "attn_k.weight", shape.hidden, kv_width);
    if (shape.sliding[i]) matrix(layer + "attn_v.weight", shape.hidden, kv_width);
    matrix(layer + "attn_output.weight", query_width, shape.hidden);
    matrix(layer + "ffn_gate.weight", shape.hidden, shape.ffn);
    matrix(layer + "ffn_up.weight", shape.hidden, shape.ffn);
    matrix(layer + "ffn_down.weight", shape.ffn, shape.hidden);
    ones(layer + "attn_q_norm.weight", head_dim);
    ones(layer + "attn_k_norm.weight", head_dim);
    for (const char* name : {"attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"}) {
      ones(layer + name + ".weight", shape.hidden);
    }
    ones(layer + "layer_output_scale.weight", 1);
  }
  return file;
}

}  // namespace nibble::test
