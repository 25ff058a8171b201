#pragma once
// A model as data: bound weights and a short list of fused steps. Plan builders (src/model) write
// it, backends (src/cpu, src/cuda, ...) run it, src/reference says what each step means.
//
// All activations are f32 rows, one per token. Weights are matrices [rows, columns] in GGUF's
// blocks, where they lie in the file's mapping; y = W x has one output per row.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/id.h"
#include "quant/quant_type.h"

namespace nibble::backend {

using ValueId = Id<struct ValueTag>;    // an activation: index into Plan::values
using WeightId = Id<struct WeightTag>;  // index into Plan::weights
using KvId = Id<struct KvTag>;          // a layer's cache: index into Plan::caches

// Consecutive rows of a weight as one tensor of the file holds them.
struct WeightSegment {
  std::string name;  // the tensor's, for messages
  quant::QuantType type;
  uint32_t rows;
  std::span<const std::byte> data;  // rows * row_bytes(type, columns), unless packed
  bool packed = false;              // `data` is in the layout of the backend that it was packed for
};

// How a backend keeps weights: as GGUF's blocks, or in a layout of its own with the same values.
enum class WeightStorage { kDirect, kPacked };
std::string_view to_string(WeightStorage storage);  // "direct", "packed"

// A matrix, possibly fused from several tensors (q+k+v, gate+up): its rows are its segments' rows,
// one after the other, and each segment keeps its own type.
struct Weight {
  uint32_t columns = 0;
  std::vector<WeightSegment> segments;

  uint32_t rows() const;
  uint64_t bytes() const;
};

// x / sqrt(mean(x^2) + epsilon) * weight. An empty weight means all ones.
struct RmsNorm {
  std::vector<float> weight;
  float epsilon = 0;
};

// Rotary positions in NeoX halves: dimension d turns with d + head_dim/2 by
// position * inverse_frequencies[d]; 0 leaves the pair alone.
struct Rope {
  std::vector<float> inverse_frequencies;  // [head_dim / 2], radians per position
};

struct AttentionShape {
  uint32_t query_heads = 0;
  uint32_t kv_heads =
      0;  // divides query_heads; query head h reads KV head h / (query_heads / kv_heads)
  uint32_t head_dim = 0;

  uint32_t query_width() const { return query_heads * head_dim; }
  uint32_t kv_width() const { return kv_heads * head_dim; }
};

enum class Activation { kGeluTanh };

// output = scale * row `token` of the table
struct EmbedStep {
  WeightId table;  // [vocabulary, hidden]
  float scale;
  ValueId output;  // [tokens, hidden]
};

// h = norm(input); q, k, v = segments of (qkv h). Then per head: q = rope(query_norm(q)),
// k' = rope(key_norm(k)), v' = value_norm(v). Writes q to `query` and appends k', v' to `cache` at
// the tokens' positions. Where value_is_key, the weight has no v rows and v = k before key_norm.
struct NormQkvStep {
  ValueId input;  // [tokens, hidden]
  RmsNorm norm;
  WeightId qkv;  // [query_width + kv_width (+ kv_width), hidden]
  AttentionShape shape;
  bool value_is_key;
  std::optional<RmsNorm> query_norm, key_norm, value_norm;  // over head_dim
  Rope rope;
  KvId cache;
  ValueId query;  // [tokens, query_width]
};

// output = softmax(scale * q k^T) v over the cache's keys at 0 <= q_position - k_position < window
// (window 0: all earlier ones and the token's own).
struct AttendStep {
  ValueId query;  // [tokens, query_width]
  KvId cache;
  AttentionShape shape;
  float scale;
  ValueId output;  // [tokens, query_width]
};

// residual = (residual + post_norm(weight input)) * output_scale
struct ProjectStep {
  ValueId input;
  WeightId weight;  // [hidden, input width]
  std::optional<RmsNorm> post_norm;
  float output_scale;
  ValueId residual;  // [tokens, hidden], read and written
};

// h = norm(residual); g, u = halves of (gate_up h);
// residual = (residual + post_norm(down (activation(g) * u))) * output_scale
struct GatedMlpStep {
  ValueId residual;  // [tokens, hidden], read and written
  RmsNorm norm;
  WeightId gate_up;  // [2 * ffn, hidden]: all gate rows, then all up rows
  Activation activation;
  WeightId down;  // [hidden, ffn]
  std::optional<RmsNorm> post_norm;
  float output_scale;
};

// logits = softcap * tanh(weight norm(input) / softcap), softcap 0: none.
// Only for the rows that the batch asks for.
struct LogitsStep {
  ValueId input;  // [tokens, hidden]
  RmsNorm norm;
  WeightId weight;  // [vocabulary, hidden]; may be the embedding table
  float softcap;
};

using Step =
    std::variant<EmbedStep, NormQkvStep, AttendStep, ProjectStep, GatedMlpStep, LogitsStep>;

std::string_view step_name(const Step& step);  // "NormQkv"

struct Value {
  std::string name;
  uint32_t width;  // floats in a token's row
};

// What one layer keeps of every token.
struct KvCacheShape {
  uint32_t kv_heads;
  uint32_t head_dim;
  uint32_t window;    // how many positions back queries look, the token's own included; 0: all
  bool value_is_key;  // K and V come from one vector, so one stored row could serve both
};

struct Plan {
  std::string architecture;  // "gemma4"
  uint32_t vocabulary = 0;
  uint32_t hidden = 0;
  uint32_t trained_context = 0;
  std::vector<Value> values;
  std::vector<Weight> weights;
  std::vector<KvCacheShape> caches;
  std::vector<Step> steps;

  const Weight& weight(WeightId id) const { return weights[id.value]; }
  const Value& value(ValueId id) const { return values[id.value]; }
  const KvCacheShape& cache(KvId id) const { return caches[id.value]; }
  uint64_t weight_bytes() const;  // each segment's bytes once, also when two weights share them
};

}  // namespace nibble::backend
