#include "reference/reference_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "base/error.h"
#include "base/thread_pool.h"
#include "reference/kv_rows.h"
#include "reference/linear.h"
#include "reference/steps.h"

namespace nibble::reference {
namespace {

using namespace backend;

std::span<float> row(std::span<float> rows, size_t index, size_t width) {
  return rows.subspan(index * width, width);
}
std::span<const float> row(std::span<const float> rows, size_t index, size_t width) {
  return rows.subspan(index * width, width);
}

float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::kGeluTanh:
      return gelu_tanh(x);
  }
  NIBBLE_CHECK(!"an activation");
  return x;
}

// The last tokens whose logits are computed: those for the host, and the one to sample from.
size_t wanted_logit_rows(const BatchSequence& sequence) {
  return std::max(sequence.logit_rows, sequence.sample ? 1u : 0u);
}

class ReferenceBackend final : public Backend {
 public:
  ReferenceBackend(const Plan& plan, const BackendOptions& options)
      : plan_(plan),
        ubatch_(options.ubatch),
        pool_(options.threads),
        kv_(make_kv_groups(plan, options.kv), options.max_kv_pages),
        kv_places_(kv_places(plan, kv_.groups())),
        values_(plan.values.size()) {}

  std::string description() const override {
    return fmt::format("reference: {} threads, f32 activations", pool_.size());
  }
  KvStore& kv() override { return kv_; }
  MemoryUse memory() const override;
  void run(const Batch& batch, BatchResult& result) override;

 private:
  // A token of the batch. Its index in tokens_ is its row in every value.
  struct Token {
    TokenId id;
    const BatchSequence* sequence;
    uint32_t position;
  };

  void list_tokens(const Batch& batch);

  // Each returns the value it wrote, if any.
  std::optional<ValueId> run_step(const EmbedStep& step);
  std::optional<ValueId> run_step(const NormQkvStep& step);
  std::optional<ValueId> run_step(const AttendStep& step);
  std::optional<ValueId> run_step(const ProjectStep& step);
  std::optional<ValueId> run_step(const GatedMlpStep& step);
  std::optional<ValueId> run_step(const LogitsStep& step);

  // Calls body(item) for all items, on all threads; throws what one of them threw.
  template <class Body>
  void for_each(size_t items, const Body& body);
  // Rows of plan_.hidden values. `input` may view `output`.
  void norm_rows(const RmsNorm& norm, std::span<const float> input, std::vector<float>& output);
  // output = input weight^T
  void multiply(WeightId weight, std::span<const float> input, std::vector<float>& output);
  // Norms and turns the token's row of product_; writes its query and its cache rows.
  void finish_query_key_value(const NormQkvStep& step, size_t token);
  // `tokens` are all those of one sequence.
  void attend_sequence(const AttendStep& step, std::span<const Token> tokens);
  // residual = (residual + post_norm(product_)) * output_scale
  void add_product(const std::optional<RmsNorm>& post_norm, float output_scale, ValueId residual);
  // `logits` are the sequence's wanted rows: [wanted_logit_rows, vocabulary].
  void take_logits(const BatchSequence& sequence, std::span<const float> logits);

  KvRows kv_rows(const BatchSequence& sequence, KvId cache) {
    return {kv_, *sequence.kv, kv_places_[cache.value], plan_};
  }
  std::span<float> value(ValueId id) { return values_[id.value]; }
  uint32_t width(ValueId id) const { return plan_.value(id).width; }

  const Plan& plan_;
  const uint32_t ubatch_;
  ThreadPool pool_;
  backend::HostKvStore kv_;
  const std::vector<KvPlace> kv_places_;

  // Of the running batch.
  std::span<const BatchSequence> sequences_;
  BatchResult* result_ = nullptr;
  std::vector<Token> tokens_;
  std::vector<std::vector<float>> values_;  // [value][tokens, width]
  std::vector<float> normed_;               // [tokens, hidden]
  std::vector<float> product_;              // [tokens, rows of a weight]
  std::vector<float> gated_;                // [tokens, ffn]
  std::vector<float> visible_keys_;         // [kv_heads, positions, head_dim]
  std::vector<float> visible_values_;       // [kv_heads, positions, head_dim]
};

MemoryUse ReferenceBackend::memory() const {
  uint64_t floats = 0;
  for (const auto& value : values_) floats += value.capacity();
  for (const auto* scratch : {&normed_, &product_, &gated_, &visible_keys_, &visible_values_}) {
    floats += scratch->capacity();
  }
  return {.weights_bytes = plan_.weight_bytes(),
          .kv_bytes = kv_.allocated_bytes(),
          .workspace_bytes = floats * sizeof(float)};
}

void ReferenceBackend::run(const Batch& batch, BatchResult& result) {
  list_tokens(batch);
  result.logits.clear();
  result.sampled.clear();
  result_ = &result;
  for (size_t i = 0; i < plan_.values.size(); ++i) {
    values_[i].resize(tokens_.size() * plan_.values[i].width);
  }
  for (size_t i = 0; i < plan_.steps.size(); ++i) {
    if (batch.stop && batch.stop()) {
      fail(ErrorCode::kCancelled, "cancelled before step {} of {}", i + 1, plan_.steps.size());
    }
    const auto written =
        std::visit([&](const auto& step) { return run_step(step); }, plan_.steps[i]);
    if (batch.observe && written) batch.observe(i, *written, value(*written));
  }
}

void ReferenceBackend::list_tokens(const Batch& batch) {
  sequences_ = batch.sequences;
  tokens_.clear();
  for (const BatchSequence& sequence : sequences_) {
    NIBBLE_CHECK(!sequence.tokens.empty() && sequence.logit_rows <= sequence.tokens.size());
    uint32_t position = sequence.kv->length();
    for (TokenId id : sequence.tokens) {
      NIBBLE_CHECK(id.value >= 0 && uint32_t(id.value) < plan_.vocabulary);
      tokens_.push_back({id, &sequence, position++});
    }
  }
  NIBBLE_CHECK(tokens_.size() <= ubatch_);
}

template <class Body>
void ReferenceBackend::for_each(size_t items, const Body& body) {
  std::mutex mutex;
  std::exception_ptr error;
  pool_.for_each_chunk(items, 1, [&](size_t item, size_t, uint32_t) {
    try {
      body(item);
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

void ReferenceBackend::norm_rows(const RmsNorm& norm, std::span<const float> input,
                                 std::vector<float>& output) {
  output.resize(input.size());
  const size_t width = plan_.hidden;
  for_each(input.size() / width, [&](size_t i) {
    rms_norm(norm, row(input, i, width), row(std::span(output), i, width));
  });
}

void ReferenceBackend::multiply(WeightId id, std::span<const float> input,
                                std::vector<float>& output) {
  const Weight& weight = plan_.weight(id);
  output.resize(input.size() / weight.columns * weight.rows());
  linear(pool_, weight, input, output);
}

std::optional<ValueId> ReferenceBackend::run_step(const EmbedStep& step) {
  for_each(tokens_.size(), [&](size_t token) {
    const std::span output = row(value(step.output), token, width(step.output));
    dequantize_row(plan_.weight(step.table), uint32_t(tokens_[token].id.value), output);
    for (float& x : output) x *= step.scale;
  });
  return step.output;
}

std::optional<ValueId> ReferenceBackend::run_step(const NormQkvStep& step) {
  norm_rows(step.norm, value(step.input), normed_);
  multiply(step.qkv, normed_, product_);
  for_each(tokens_.size(), [&](size_t token) { finish_query_key_value(step, token); });
  return step.query;
}

void ReferenceBackend::finish_query_key_value(const NormQkvStep& step, size_t token) {
  const AttentionShape& shape = step.shape;
  const uint32_t position = tokens_[token].position;
  const std::span qkv =
      row(std::span(std::as_const(product_)), token, plan_.weight(step.qkv).rows());
  const std::span queries = qkv.first(shape.query_width());
  const std::span keys = qkv.subspan(shape.query_width(), shape.kv_width());
  const std::span values = step.value_is_key ? keys : qkv.last(shape.kv_width());
  const auto normed = [](const std::optional<RmsNorm>& norm, std::span<const float> head) {
    std::vector<float> result(head.begin(), head.end());
    if (norm) rms_norm(*norm, head, result);
    return result;
  };

  const std::span query_rows = row(value(step.query), token, shape.query_width());
  for (uint32_t head = 0; head < shape.query_heads; ++head) {
    std::vector<float> query = normed(step.query_norm, row(queries, head, shape.head_dim));
    rotate(step.rope, position, query);
    std::ranges::copy(query, row(query_rows, head, shape.head_dim).begin());
  }
  KvRows cache = kv_rows(*tokens_[token].sequence, step.cache);
  for (uint32_t head = 0; head < shape.kv_heads; ++head) {
    std::vector<float> key = normed(step.key_norm, row(keys, head, shape.head_dim));
    rotate(step.rope, position, key);
    cache.write(head, position, key, normed(step.value_norm, row(values, head, shape.head_dim)));
  }
}

std::optional<ValueId> ReferenceBackend::run_step(const AttendStep& step) {
  std::span<const Token> rest = tokens_;
  for (const BatchSequence& sequence : sequences_) {
    attend_sequence(step, rest.first(sequence.tokens.size()));
    rest = rest.subspan(sequence.tokens.size());
  }
  return step.output;
}

void ReferenceBackend::attend_sequence(const AttendStep& step, std::span<const Token> tokens) {
  const AttentionShape& shape = step.shape;
  const uint32_t window = plan_.cache(step.cache).window;
  const auto first_visible = [&](uint32_t position) {
    return window == 0 || position < window ? 0 : position - window + 1;
  };
  const uint32_t begin = first_visible(tokens.front().position);
  const uint32_t positions = tokens.back().position + 1 - begin;
  const size_t head_values = size_t{positions} * shape.head_dim;
  visible_keys_.resize(shape.kv_heads * head_values);
  visible_values_.resize(shape.kv_heads * head_values);
  const KvRows cache = kv_rows(*tokens.front().sequence, step.cache);
  for_each(size_t{shape.kv_heads} * positions, [&](size_t i) {
    cache.read(uint32_t(i / positions), begin + uint32_t(i % positions),
               row(std::span(visible_keys_), i, shape.head_dim),
               row(std::span(visible_values_), i, shape.head_dim));
  });

  const size_t first_token = size_t(tokens.data() - tokens_.data());
  const uint32_t queries_per_kv_head = shape.query_heads / shape.kv_heads;
  for_each(tokens.size() * shape.query_heads, [&](size_t i) {
    const uint32_t position = tokens[i / shape.query_heads].position;
    const size_t kv_head = i % shape.query_heads / queries_per_kv_head;
    const size_t skipped = (first_visible(position) - begin) * size_t{shape.head_dim};
    const size_t seen = (position + 1 - begin) * size_t{shape.head_dim} - skipped;
    const size_t head = first_token * shape.query_heads + i;
    attend(row(value(step.query), head, shape.head_dim),
           row(std::span(visible_keys_), kv_head, head_values).subspan(skipped, seen),
           row(std::span(visible_values_), kv_head, head_values).subspan(skipped, seen), step.scale,
           row(value(step.output), head, shape.head_dim));
  });
}

std::optional<ValueId> ReferenceBackend::run_step(const ProjectStep& step) {
  multiply(step.weight, value(step.input), product_);
  add_product(step.post_norm, step.output_scale, step.residual);
  return step.residual;
}

std::optional<ValueId> ReferenceBackend::run_step(const GatedMlpStep& step) {
  norm_rows(step.norm, value(step.residual), normed_);
  multiply(step.gate_up, normed_, product_);
  const size_t ffn = plan_.weight(step.down).columns;
  gated_.resize(tokens_.size() * ffn);
  for_each(tokens_.size(), [&](size_t token) {
    const std::span gate_up = row(std::span(product_), token, 2 * ffn);
    for (size_t i = 0; i < ffn; ++i) {
      gated_[token * ffn + i] = activate(step.activation, gate_up[i]) * gate_up[ffn + i];
    }
  });
  multiply(step.down, gated_, product_);
  add_product(step.post_norm, step.output_scale, step.residual);
  return step.residual;
}

void ReferenceBackend::add_product(const std::optional<RmsNorm>& post_norm, float output_scale,
                                   ValueId residual) {
  if (post_norm) norm_rows(*post_norm, product_, product_);
  const std::span output = value(residual);
  for (size_t i = 0; i < output.size(); ++i) output[i] = (output[i] + product_[i]) * output_scale;
}

std::optional<ValueId> ReferenceBackend::run_step(const LogitsStep& step) {
  const size_t hidden = plan_.hidden;
  const size_t vocabulary = plan_.vocabulary;
  // Rows of the tokens whose logits somebody wants.
  std::vector<float> input;
  size_t end = 0;
  for (const BatchSequence& sequence : sequences_) {
    end += sequence.tokens.size();
    const size_t rows = wanted_logit_rows(sequence);
    const std::span wanted = value(step.input).subspan((end - rows) * hidden, rows * hidden);
    input.insert(input.end(), wanted.begin(), wanted.end());
  }
  if (input.empty()) return std::nullopt;
  norm_rows(step.norm, input, normed_);
  multiply(step.weight, normed_, product_);
  for_each(product_.size() / vocabulary, [&](size_t i) {
    for (float& logit : row(std::span(product_), i, vocabulary)) {
      logit = softcap(logit, step.softcap);
    }
  });
  std::span<const float> rest = product_;
  for (const BatchSequence& sequence : sequences_) {
    const size_t values = wanted_logit_rows(sequence) * vocabulary;
    take_logits(sequence, rest.first(values));
    rest = rest.subspan(values);
  }
  return std::nullopt;
}

void ReferenceBackend::take_logits(const BatchSequence& sequence, std::span<const float> logits) {
  const std::span rows = logits.last(size_t{sequence.logit_rows} * plan_.vocabulary);
  result_->logits.insert(result_->logits.end(), rows.begin(), rows.end());
  if (!sequence.sample) return;
  const std::span last = logits.last(plan_.vocabulary);
  std::vector<float> changed(last.begin(), last.end());
  result_->sampled.push_back(sample(changed, *sequence.sample));
}

}  // namespace

std::unique_ptr<Backend> make_reference_backend(const Plan& plan, const BackendOptions& options) {
  return std::make_unique<ReferenceBackend>(plan, options);
}

}  // namespace nibble::reference
