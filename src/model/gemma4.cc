#include "model/gemma4.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "base/error.h"
#include "model/binder.h"

namespace nibble::model {
namespace {

using backend::KvId;
using backend::Plan;
using backend::RmsNorm;
using backend::ValueId;
using backend::WeightId;

// Metadata under "gemma4." with its ranges checked.
class Reader {
 public:
  explicit Reader(const gguf::GgufFile& file) : file_(file) {}

  static std::string key(std::string_view name) { return fmt::format("gemma4.{}", name); }

  uint32_t count(std::string_view name, uint64_t largest = INT32_MAX) const {
    return checked_count(key(name), file_.require_uint(key(name)), largest);
  }
  uint32_t count_or(std::string_view name, uint32_t fallback) const {
    const auto value = file_.find_uint(key(name));
    return value ? checked_count(key(name), *value, INT32_MAX) : fallback;
  }
  // One number for all layers, or an array with one for each.
  std::vector<uint32_t> count_per_layer(std::string_view name, uint32_t layers) const {
    const gguf::Metadata* entry = file_.find(key(name));
    if (entry == nullptr || entry->type != gguf::ValueType::kArray) {
      return std::vector<uint32_t>(layers, count(name));
    }
    const std::vector<uint64_t> values = *file_.find_uint_array(key(name));
    require_per_layer(name, values.size(), layers);
    std::vector<uint32_t> counts;
    for (uint64_t value : values) counts.push_back(checked_count(key(name), value, INT32_MAX));
    return counts;
  }
  std::vector<bool> flag_per_layer(std::string_view name, uint32_t layers) const {
    const auto values = file_.find_bool_array(key(name));
    if (!values)
      fail(ErrorCode::kMalformedFile, "{} is missing: expected {} bools", key(name), layers);
    require_per_layer(name, values->size(), layers);
    return *values;
  }
  float positive(std::string_view name, double value) const {
    if (!(value > 0 && value <= 1e30)) {
      fail(ErrorCode::kMalformedFile, "{} is {}; expected a positive, finite number", key(name),
           value);
    }
    return float(value);
  }
  float positive(std::string_view name) const {
    return positive(name, file_.require_float(key(name)));
  }
  float positive_or_zero(std::string_view name) const {
    const double value = file_.find_float(key(name)).value_or(0);
    return value == 0 ? 0 : positive(name, value);
  }
  // Parts of the family that are not run yet are refused by name.
  void refuse_unless_zero(std::string_view name, std::string_view what) const {
    const uint64_t value = file_.find_uint(key(name)).value_or(0);
    if (value != 0) {
      fail(ErrorCode::kUnsupported,
           "{} is {}: Gemma 4 with {} is not supported yet; the dense models (31B) are", key(name),
           value, what);
    }
  }

 private:
  static uint32_t checked_count(const std::string& key, uint64_t value, uint64_t largest) {
    if (value == 0 || value > largest) {
      fail(ErrorCode::kMalformedFile, "{} is {}; expected 1 to {}", key, value, largest);
    }
    return uint32_t(value);
  }
  static void require_per_layer(std::string_view name, size_t found, uint32_t layers) {
    if (found != layers) {
      fail(ErrorCode::kMalformedFile,
           "{} has {} elements; expected one for each of the {} layers ({})", key(name), found,
           layers, key("block_count"));
    }
  }

  const gguf::GgufFile& file_;
};

// What differs between sliding and full layers.
struct LayerKind {
  uint32_t head_dim;
  uint32_t window;  // 0: full
  backend::Rope rope;
  ValueId query, attended;
};

struct HyperParameters {
  uint32_t layers, hidden, query_heads;
  std::vector<uint32_t> kv_heads, ffn;  // per layer
  std::vector<bool> sliding;            // per layer
  float epsilon, softcap;
};

HyperParameters read_hyper_parameters(const gguf::GgufFile& file, const Reader& reader) {
  reader.refuse_unless_zero("embedding_length_per_layer_input", "per-layer embeddings (E2B, E4B)");
  reader.refuse_unless_zero("attention.shared_kv_layers",
                            "layers that share keys and values (E2B, E4B)");
  reader.refuse_unless_zero("expert_count", "experts (26B-A4B)");

  HyperParameters h;
  // A layer has tensors of its own, so a count beyond theirs is refused before it sizes anything.
  h.layers = reader.count("block_count", std::max<size_t>(file.tensors().size(), 1));
  h.hidden = reader.count("embedding_length");
  h.query_heads = reader.count("attention.head_count");
  h.kv_heads = reader.count_per_layer("attention.head_count_kv", h.layers);
  for (uint32_t kv_heads : h.kv_heads) {
    if (h.query_heads % kv_heads != 0) {
      fail(ErrorCode::kMalformedFile, "{} is {}, which is no multiple of {} in {}",
           Reader::key("attention.head_count"), h.query_heads, kv_heads,
           Reader::key("attention.head_count_kv"));
    }
  }
  h.ffn = reader.count_per_layer("feed_forward_length", h.layers);
  h.sliding = reader.flag_per_layer("attention.sliding_window_pattern", h.layers);
  h.epsilon = reader.positive("attention.layer_norm_rms_epsilon");
  h.softcap = reader.positive_or_zero("final_logit_softcapping");
  return h;
}

// `suffix` is "" for full layers and "_swa" for sliding ones.
uint32_t read_head_dim(const Reader& reader, const std::string& suffix) {
  const std::string name = "attention.key_length" + suffix;
  const uint32_t head_dim = reader.count(name, 65536);
  if (head_dim % 2 != 0) {
    fail(ErrorCode::kMalformedFile, "{} is {}; expected an even number", Reader::key(name),
         head_dim);
  }
  for (const char* other : {"attention.value_length", "rope.dimension_count"}) {
    const uint32_t value = reader.count_or(other + suffix, head_dim);
    if (value != head_dim) {
      fail(ErrorCode::kMalformedFile, "{} is {}, but {} is {}; expected the same",
           Reader::key(other + suffix), value, Reader::key(name), head_dim);
    }
  }
  return head_dim;
}

// base^(-2d / head_dim), divided by the file's factors: 1 where a pair turns, 1e30 where not.
backend::Rope make_rope(double base, uint32_t head_dim, const std::vector<float>& factors) {
  backend::Rope rope;
  for (uint32_t d = 0; d < head_dim / 2; ++d) {
    const double factor = factors.empty() ? 1.0 : factors[d];
    const double frequency = std::pow(base, -2.0 * d / head_dim) / factor;
    rope.inverse_frequencies.push_back(frequency > 1e-20 ? float(frequency) : 0.0f);
  }
  return rope;
}

class Builder {
 public:
  explicit Builder(const gguf::GgufFile& file)
      : file_(file), reader_(file), binder_(file), h_(read_hyper_parameters(file, reader_)) {}

  Plan build() {
    plan_.hidden = h_.hidden;
    plan_.trained_context = reader_.count("context_length");
    residual_ = add_value("residual", h_.hidden);
    const WeightId table = add_embedding();
    LayerKind sliding{}, full{};
    // A kind that no layer is of needs no metadata.
    if (has_layer(true)) sliding = make_kind("_swa", reader_.count("attention.sliding_window"));
    if (has_layer(false)) full = make_kind("", 0);
    for (uint32_t i = 0; i < h_.layers; ++i) add_layer(i, h_.sliding[i] ? sliding : full);
    add_logits(table);
    return std::move(plan_);
  }

 private:
  bool has_layer(bool sliding) const {
    return std::find(h_.sliding.begin(), h_.sliding.end(), sliding) != h_.sliding.end();
  }

  ValueId add_value(std::string name, uint32_t width) {
    plan_.values.push_back({std::move(name), width});
    return {uint32_t(plan_.values.size() - 1)};
  }
  WeightId add_weight(const std::vector<MatrixSpec>& parts) {
    plan_.weights.push_back(binder_.matrix(parts));
    return {uint32_t(plan_.weights.size() - 1)};
  }
  RmsNorm norm(const std::string& tensor, uint32_t width) const {
    return {.weight = binder_.vector(tensor, width), .epsilon = h_.epsilon};
  }

  WeightId add_embedding() {
    const gguf::Tensor* table = file_.find_tensor("token_embd.weight");
    plan_.vocabulary =
        table == nullptr ? 0 : uint32_t(std::min<uint64_t>(table->rows(), INT32_MAX));
    const WeightId id = add_weight({{"token_embd.weight", plan_.vocabulary, h_.hidden}});
    plan_.steps.push_back(
        backend::EmbedStep{.table = id, .scale = std::sqrt(float(h_.hidden)), .output = residual_});
    return id;
  }

  LayerKind make_kind(const std::string& suffix, uint32_t window) {
    const uint32_t head_dim = read_head_dim(reader_, suffix);
    const uint64_t width = uint64_t{h_.query_heads} * head_dim;
    if (width > INT32_MAX) {
      fail(ErrorCode::kMalformedFile, "{} x {} is {}; expected at most {}",
           Reader::key("attention.head_count"), Reader::key("attention.key_length" + suffix), width,
           INT32_MAX);
    }
    const float base = reader_.positive("rope.freq_base" + suffix);
    const std::vector<float> factors =
        window != 0
            ? std::vector<float>{}
            : binder_.find_vector("rope_freqs.weight", head_dim / 2).value_or(std::vector<float>{});
    for (float factor : factors) {
      if (!(factor > 0)) {
        fail(ErrorCode::kMalformedFile, "rope_freqs.weight holds {}; expected positive factors",
             factor);
      }
    }
    return {.head_dim = head_dim,
            .window = window,
            .rope = make_rope(base, head_dim, factors),
            .query = add_value("query" + suffix, uint32_t(width)),
            .attended = add_value("attended" + suffix, uint32_t(width))};
  }

  void add_layer(uint32_t layer, const LayerKind& kind) {
    const auto tensor = [&](std::string_view name) {
      return fmt::format("blk.{}.{}.weight", layer, name);
    };
    const backend::AttentionShape shape{
        .query_heads = h_.query_heads, .kv_heads = h_.kv_heads[layer], .head_dim = kind.head_dim};
    // A layer without a V matrix takes its values from the keys, before their norm.
    const bool value_is_key = !binder_.has(tensor("attn_v"));
    std::vector<MatrixSpec> qkv = {{tensor("attn_q"), shape.query_width(), h_.hidden},
                                   {tensor("attn_k"), shape.kv_width(), h_.hidden}};
    if (!value_is_key) qkv.push_back({tensor("attn_v"), shape.kv_width(), h_.hidden});

    plan_.caches.push_back({.kv_heads = shape.kv_heads,
                            .head_dim = shape.head_dim,
                            .window = kind.window,
                            .value_is_key = value_is_key});
    const KvId cache{uint32_t(plan_.caches.size() - 1)};

    plan_.steps.push_back(
        backend::NormQkvStep{.input = residual_,
                             .norm = norm(tensor("attn_norm"), h_.hidden),
                             .qkv = add_weight(qkv),
                             .shape = shape,
                             .value_is_key = value_is_key,
                             .query_norm = norm(tensor("attn_q_norm"), shape.head_dim),
                             .key_norm = norm(tensor("attn_k_norm"), shape.head_dim),
                             .value_norm = RmsNorm{.weight = {}, .epsilon = h_.epsilon},
                             .rope = kind.rope,
                             .cache = cache,
                             .query = kind.query});
    plan_.steps.push_back(backend::AttendStep{.query = kind.query,
                                              .cache = cache,
                                              .shape = shape,
                                              .scale = 1.0f,
                                              .output = kind.attended});
    plan_.steps.push_back(backend::ProjectStep{
        .input = kind.attended,
        .weight = add_weight({{tensor("attn_output"), h_.hidden, shape.query_width()}}),
        .post_norm = norm(tensor("post_attention_norm"), h_.hidden),
        .output_scale = 1.0f,
        .residual = residual_});

    const uint32_t ffn = h_.ffn[layer];
    const auto scale = binder_.find_vector(tensor("layer_output_scale"), 1);
    plan_.steps.push_back(backend::GatedMlpStep{
        .residual = residual_,
        .norm = norm(tensor("ffn_norm"), h_.hidden),
        .gate_up =
            add_weight({{tensor("ffn_gate"), ffn, h_.hidden}, {tensor("ffn_up"), ffn, h_.hidden}}),
        .activation = backend::Activation::kGeluTanh,
        .down = add_weight({{tensor("ffn_down"), h_.hidden, ffn}}),
        .post_norm = norm(tensor("post_ffw_norm"), h_.hidden),
        .output_scale = scale ? scale->front() : 1.0f});
  }

  void add_logits(WeightId table) {
    const bool untied = binder_.has("output.weight");
    plan_.steps.push_back(backend::LogitsStep{
        .input = residual_,
        .norm = norm("output_norm.weight", h_.hidden),
        .weight = untied ? add_weight({{"output.weight", plan_.vocabulary, h_.hidden}}) : table,
        .softcap = h_.softcap});
  }

  const gguf::GgufFile& file_;
  Reader reader_;
  Binder binder_;
  HyperParameters h_;
  Plan plan_;
  ValueId residual_{};
};

}  // namespace

backend::Plan build_gemma4(const gguf::GgufFile& file) {
  return Builder(file).build();
}

}  // namespace nibble::model
