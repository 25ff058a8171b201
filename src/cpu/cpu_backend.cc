#include "cpu/cpu_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "backend/host_kv_store.h"
#include "base/aligned_array.h"
#include "base/checked_math.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "cpu/attention/attention.h"
#include "cpu/elementwise/elementwise.h"
#include "cpu/isa.h"
#include "cpu/linear/linear.h"
#include "cpu/processor.h"

namespace nibble::cpu {
namespace {

using namespace backend;

// Elementwise work that is worth handing to another thread: a microsecond or two.
constexpr size_t kFloatsPerChunk = 4096;

const float* data_or_null(const std::vector<float>& values) {
  return values.empty() ? nullptr : values.data();
}

// Cosines and sines of the batch's positions, for all layers that turn alike.
struct RopeTable {
  const std::vector<float>* inverse_frequencies;  // [head_dim / 2]
  AlignedArray<float> cosines;                    // [tokens, head_dim / 2]
  AlignedArray<float> sines;                      // [tokens, head_dim / 2]
};

class CpuBackend final : public Backend {
 public:
  CpuBackend(const Plan& plan, const BackendOptions& options, Isa isa, ChangeKvRow change_row);

  std::string description() const override {
    return fmt::format("cpu: {}, {} threads, {}", processor_name(), pool_.size(), isa_name(isa_));
  }
  KvStore& kv() override { return kv_; }
  MemoryUse memory() const override;
  void run(const Batch& batch, BatchResult& result) override;

 private:
  // A token of the batch. Its index in tokens_ is its row in every value.
  struct Token {
    TokenId id;
    const KvSequence* kv;
    uint32_t position;
  };

  void add_rope_table(const Rope& rope);
  void list_tokens(const Batch& batch);
  void fill_rope_table(const RopeTable& table);

  // Each returns the value it wrote, if any.
  std::optional<ValueId> run_step(const EmbedStep& step);
  std::optional<ValueId> run_step(const NormQkvStep& step);
  std::optional<ValueId> run_step(const AttendStep& step);
  std::optional<ValueId> run_step(const ProjectStep& step);
  std::optional<ValueId> run_step(const GatedMlpStep& step);
  std::optional<ValueId> run_step(const LogitsStep& step);

  // body(row) for all rows, of about `width` floats of work each.
  template <class Body>
  void for_each_row(size_t rows, size_t width, const Body& body);
  // body(row, begin, end) for parts of all rows of `width` floats.
  template <class Body>
  void for_each_part(size_t rows, size_t width, const Body& body);

  // normed_ = norm(input)
  void norm_rows(const RmsNorm& norm, const float* input);
  // Norms and turns a head of `qkv` into `out`, both [head_dim]; no norm: all as it is.
  void norm_head(const std::optional<RmsNorm>& norm, const float* head, uint32_t head_dim,
                 float* out);
  void store_key_value(const NormQkvStep& step, const RopeTable& rope, size_t token, uint32_t head,
                       uint32_t thread);
  // residual = (residual + post_norm(product_)) * output_scale
  void add_product(const std::optional<RmsNorm>& post_norm, float output_scale, ValueId residual);
  // Of the tokens whose rows are given: [rows, vocabulary].
  void compute_logits(const LogitsStep& step, const std::vector<size_t>& rows, float* logits);

  float* value(ValueId id) { return values_[id.value].data(); }
  size_t width(ValueId id) const { return plan_.value(id).width; }

  const Plan& plan_;
  const uint32_t ubatch_;
  const Isa isa_;
  const ElementwiseKernels& kernels_;
  ThreadPool pool_;
  backend::HostKvStore kv_;
  std::vector<RopeTable> rope_tables_;
  std::map<const Rope*, size_t> rope_table_of_;  // the plan's
  Linear linear_;
  Attention attention_;

  std::vector<AlignedArray<float>> values_;  // [value][tokens, width]
  AlignedArray<float> normed_;               // [tokens, hidden]
  AlignedArray<float> product_;              // [tokens, rows of a weight]
  AlignedArray<float> gated_;                // [tokens, ffn]
  AlignedArray<float> heads_;                // [thread, 2, head_dim]
  size_t max_head_dim_ = 0;
  std::vector<float> sample_logits_;  // [sequences that sample, vocabulary]

  // Of the running batch.
  std::span<const BatchSequence> sequences_;
  BatchResult* result_ = nullptr;
  std::vector<Token> tokens_;
  std::vector<BatchRows> batch_rows_;
};

uint32_t max_columns(const Plan& plan) {
  uint32_t columns = 0;
  for (const Weight& weight : plan.weights) columns = std::max(columns, weight.columns);
  return columns;
}

CpuBackend::CpuBackend(const Plan& plan, const BackendOptions& options, Isa isa,
                       ChangeKvRow change_row)
    : plan_(plan),
      ubatch_(options.ubatch),
      isa_(isa),
      kernels_(elementwise_kernels(isa)),
      pool_(options.threads),
      kv_(make_kv_groups(plan, options.kv), options.max_kv_pages),
      linear_(isa, pool_, options.ubatch, max_columns(plan)),
      attention_(isa, pool_, plan, kv_, std::move(change_row)) {
  size_t product_width = 0, gated_width = 0;
  for (const Step& step : plan.steps) {
    if (const auto* qkv = std::get_if<NormQkvStep>(&step)) {
      product_width = std::max<size_t>(product_width, plan.weight(qkv->qkv).rows());
      max_head_dim_ = std::max<size_t>(max_head_dim_, qkv->shape.head_dim);
      add_rope_table(qkv->rope);
    } else if (const auto* project = std::get_if<ProjectStep>(&step)) {
      product_width = std::max<size_t>(product_width, plan.weight(project->weight).rows());
    } else if (const auto* mlp = std::get_if<GatedMlpStep>(&step)) {
      product_width = std::max({product_width, size_t{plan.weight(mlp->gate_up).rows()},
                                size_t{plan.weight(mlp->down).rows()}});
      gated_width = std::max<size_t>(gated_width, plan.weight(mlp->down).columns);
    }
  }
  const size_t rows = ubatch_;
  for (const Value& value : plan.values) values_.emplace_back(rows * value.width);
  normed_ = AlignedArray<float>(rows * plan.hidden);
  product_ = AlignedArray<float>(rows * product_width);
  gated_ = AlignedArray<float>(rows * gated_width);
  heads_ = AlignedArray<float>(size_t{pool_.size()} * 2 * max_head_dim_);
}

void CpuBackend::add_rope_table(const Rope& rope) {
  const auto same = std::ranges::find_if(rope_tables_, [&](const RopeTable& table) {
    return *table.inverse_frequencies == rope.inverse_frequencies;
  });
  rope_table_of_[&rope] = size_t(same - rope_tables_.begin());
  if (same != rope_tables_.end()) return;
  const size_t floats = ubatch_ * rope.inverse_frequencies.size();
  rope_tables_.push_back({.inverse_frequencies = &rope.inverse_frequencies,
                          .cosines = AlignedArray<float>(floats),
                          .sines = AlignedArray<float>(floats)});
}

MemoryUse CpuBackend::memory() const {
  uint64_t workspace = linear_.workspace_bytes() + attention_.workspace_bytes() + normed_.bytes() +
                       product_.bytes() + gated_.bytes() + heads_.bytes() +
                       sample_logits_.capacity() * sizeof(float);
  for (const auto& value : values_) workspace += value.bytes();
  for (const auto& table : rope_tables_) workspace += table.cosines.bytes() + table.sines.bytes();
  return {.weights_bytes = plan_.weight_bytes(),
          .kv_bytes = kv_.allocated_bytes(),
          .workspace_bytes = workspace};
}

void CpuBackend::run(const Batch& batch, BatchResult& result) {
  result.logits.clear();
  result.sampled.clear();
  result_ = &result;
  list_tokens(batch);
  for (const RopeTable& table : rope_tables_) fill_rope_table(table);
  for (size_t i = 0; i < plan_.steps.size(); ++i) {
    if (batch.stop && batch.stop()) {
      fail(ErrorCode::kCancelled, "cancelled before step {} of {}", i + 1, plan_.steps.size());
    }
    const std::optional<ValueId> written =
        std::visit([&](const auto& step) { return run_step(step); }, plan_.steps[i]);
    if (batch.observe && written) {
      batch.observe(i, *written, {value(*written), tokens_.size() * width(*written)});
    }
  }
}

void CpuBackend::list_tokens(const Batch& batch) {
  sequences_ = batch.sequences;
  tokens_.clear();
  batch_rows_.clear();
  for (const BatchSequence& sequence : sequences_) {
    NIBBLE_CHECK(!sequence.tokens.empty() && sequence.logit_rows <= sequence.tokens.size());
    uint32_t position = sequence.kv->length();
    batch_rows_.push_back({.kv = sequence.kv,
                           .first_row = uint32_t(tokens_.size()),
                           .rows = uint32_t(sequence.tokens.size()),
                           .first_position = position});
    for (TokenId id : sequence.tokens) {
      NIBBLE_CHECK(id.value >= 0 && uint32_t(id.value) < plan_.vocabulary);
      tokens_.push_back({id, sequence.kv, position++});
    }
  }
  NIBBLE_CHECK(tokens_.size() <= ubatch_);
}

void CpuBackend::fill_rope_table(const RopeTable& table) {
  const std::vector<float>& frequencies = *table.inverse_frequencies;
  const size_t half = frequencies.size();
  constexpr size_t kFloatsOfWorkPerAngle = 32;  // what a cosine and a sine cost
  for_each_row(tokens_.size(), half * kFloatsOfWorkPerAngle, [&](size_t token) {
    for (size_t d = 0; d < half; ++d) {
      const float angle = float(tokens_[token].position) * frequencies[d];
      table.cosines.data()[token * half + d] = std::cos(angle);
      table.sines.data()[token * half + d] = std::sin(angle);
    }
  });
}

template <class Body>
void CpuBackend::for_each_row(size_t rows, size_t width, const Body& body) {
  const size_t grain = std::max<size_t>(1, kFloatsPerChunk / width);
  pool_.for_each_chunk(rows, grain, [&](size_t begin, size_t end, uint32_t) {
    for (size_t row = begin; row < end; ++row) body(row);
  });
}

template <class Body>
void CpuBackend::for_each_part(size_t rows, size_t width, const Body& body) {
  const size_t parts = ceil_div(width, kFloatsPerChunk);
  for_each_row(rows * parts, std::min(width, kFloatsPerChunk), [&](size_t i) {
    const size_t begin = i % parts * kFloatsPerChunk;
    body(i / parts, begin, std::min(width, begin + kFloatsPerChunk));
  });
}

void CpuBackend::norm_rows(const RmsNorm& norm, const float* input) {
  const size_t width = plan_.hidden;
  for_each_row(tokens_.size(), width, [&](size_t row) {
    kernels_.rms_norm(input + row * width, data_or_null(norm.weight), width, norm.epsilon,
                      normed_.data() + row * width);
  });
}

std::optional<ValueId> CpuBackend::run_step(const EmbedStep& step) {
  const size_t width = this->width(step.output);
  for_each_row(tokens_.size(), width, [&](size_t token) {
    float* row = value(step.output) + token * width;
    gather_row(plan_.weight(step.table), uint32_t(tokens_[token].id.value), row);
    kernels_.scale(step.scale, width, row);
  });
  return step.output;
}

std::optional<ValueId> CpuBackend::run_step(const NormQkvStep& step) {
  const AttentionShape& shape = step.shape;
  const Weight& weight = plan_.weight(step.qkv);
  norm_rows(step.norm, value(step.input));
  linear_.run(weight, normed_.data(), tokens_.size(), product_.data());

  const RopeTable& rope = rope_tables_[rope_table_of_.at(&step.rope)];
  const size_t heads = shape.query_heads + shape.kv_heads;
  const size_t half = shape.head_dim / 2;
  const size_t grain = std::max<size_t>(1, kFloatsPerChunk / shape.head_dim);
  pool_.for_each_chunk(
      tokens_.size() * heads, grain, [&](size_t begin, size_t end, uint32_t thread) {
        for (size_t i = begin; i < end; ++i) {
          const size_t token = i / heads;
          const uint32_t head = uint32_t(i % heads);
          if (head >= shape.query_heads) {
            store_key_value(step, rope, token, head - shape.query_heads, thread);
            continue;
          }
          const size_t offset = size_t{head} * shape.head_dim;
          float* query = value(step.query) + token * shape.query_width() + offset;
          norm_head(step.query_norm, product_.data() + token * weight.rows() + offset,
                    shape.head_dim, query);
          kernels_.rotate(rope.cosines.data() + token * half, rope.sines.data() + token * half,
                          half, query);
        }
      });
  return step.query;
}

void CpuBackend::norm_head(const std::optional<RmsNorm>& norm, const float* head, uint32_t head_dim,
                           float* out) {
  if (norm) {
    kernels_.rms_norm(head, data_or_null(norm->weight), head_dim, norm->epsilon, out);
  } else {
    std::memcpy(out, head, head_dim * sizeof(float));
  }
}

void CpuBackend::store_key_value(const NormQkvStep& step, const RopeTable& rope, size_t token,
                                 uint32_t head, uint32_t thread) {
  const AttentionShape& shape = step.shape;
  const size_t head_dim = shape.head_dim;
  const float* keys = product_.data() + token * plan_.weight(step.qkv).rows() + shape.query_width();
  const float* values = step.value_is_key ? keys : keys + shape.kv_width();
  float* key = heads_.data() + thread * 2 * max_head_dim_;
  float* value = key + head_dim;
  norm_head(step.key_norm, keys + head * head_dim, shape.head_dim, key);
  norm_head(step.value_norm, values + head * head_dim, shape.head_dim, value);
  const size_t half = head_dim / 2;
  kernels_.rotate(rope.cosines.data() + token * half, rope.sines.data() + token * half, half, key);

  attention_.store(step.cache, *tokens_[token].kv, tokens_[token].position, head, key, value,
                   thread);
}

std::optional<ValueId> CpuBackend::run_step(const AttendStep& step) {
  attention_.run(step, batch_rows_, value(step.query), value(step.output));
  return step.output;
}

std::optional<ValueId> CpuBackend::run_step(const ProjectStep& step) {
  linear_.run(plan_.weight(step.weight), value(step.input), tokens_.size(), product_.data());
  add_product(step.post_norm, step.output_scale, step.residual);
  return step.residual;
}

std::optional<ValueId> CpuBackend::run_step(const GatedMlpStep& step) {
  norm_rows(step.norm, value(step.residual));
  linear_.run(plan_.weight(step.gate_up), normed_.data(), tokens_.size(), product_.data());
  const size_t ffn = plan_.weight(step.down).columns;
  NIBBLE_CHECK(step.activation == Activation::kGeluTanh);
  for_each_part(tokens_.size(), ffn, [&](size_t token, size_t begin, size_t end) {
    const float* gate = product_.data() + token * 2 * ffn;
    kernels_.gated_gelu(gate + begin, gate + ffn + begin, end - begin,
                        gated_.data() + token * ffn + begin);
  });
  linear_.run(plan_.weight(step.down), gated_.data(), tokens_.size(), product_.data());
  add_product(step.post_norm, step.output_scale, step.residual);
  return step.residual;
}

void CpuBackend::add_product(const std::optional<RmsNorm>& post_norm, float output_scale,
                             ValueId residual) {
  const size_t width = this->width(residual);
  for_each_row(tokens_.size(), width, [&](size_t token) {
    float* product = product_.data() + token * width;
    if (post_norm) {
      kernels_.rms_norm(product, data_or_null(post_norm->weight), width, post_norm->epsilon,
                        product);
    }
    kernels_.add_and_scale(product, width, output_scale, value(residual) + token * width);
  });
}

std::optional<ValueId> CpuBackend::run_step(const LogitsStep& step) {
  const size_t vocabulary = plan_.vocabulary;
  std::vector<size_t> wanted, sampled;
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const size_t end = batch_rows_[i].first_row + batch_rows_[i].rows;
    for (size_t row = end - sequences_[i].logit_rows; row < end; ++row) wanted.push_back(row);
    if (sequences_[i].sample && sequences_[i].logit_rows == 0) sampled.push_back(end - 1);
  }
  result_->logits.resize(wanted.size() * vocabulary);
  compute_logits(step, wanted, result_->logits.data());
  sample_logits_.resize(sampled.size() * vocabulary);
  compute_logits(step, sampled, sample_logits_.data());

  const float* last_wanted = result_->logits.data();
  float* next_sampled = sample_logits_.data();
  std::vector<float> copy;
  for (const BatchSequence& sequence : sequences_) {
    last_wanted += sequence.logit_rows * vocabulary;
    if (!sequence.sample) continue;
    std::span<float> logits(next_sampled, vocabulary);
    if (sequence.logit_rows == 0) {
      next_sampled += vocabulary;
    } else {  // sample() changes them
      copy.assign(last_wanted - vocabulary, last_wanted);
      logits = copy;
    }
    result_->sampled.push_back(sample(logits, *sequence.sample));
  }
  return std::nullopt;
}

void CpuBackend::compute_logits(const LogitsStep& step, const std::vector<size_t>& rows,
                                float* logits) {
  if (rows.empty()) return;
  const size_t hidden = plan_.hidden;
  for_each_row(rows.size(), hidden, [&](size_t i) {
    kernels_.rms_norm(value(step.input) + rows[i] * hidden, data_or_null(step.norm.weight), hidden,
                      step.norm.epsilon, normed_.data() + i * hidden);
  });
  linear_.run(plan_.weight(step.weight), normed_.data(), rows.size(), logits);
  if (step.softcap == 0) return;
  for_each_part(rows.size(), plan_.vocabulary, [&](size_t row, size_t begin, size_t end) {
    kernels_.softcap(step.softcap, end - begin, logits + row * plan_.vocabulary + begin);
  });
}

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(const Plan& plan, const BackendOptions& options) {
  return make_cpu_backend_with(plan, options, {});
}

std::unique_ptr<Backend> make_cpu_backend_with(const Plan& plan, const BackendOptions& options,
                                               ChangeKvRow change) {
  try {
    return std::make_unique<CpuBackend>(plan, options, default_isa(), std::move(change));
  } catch (const std::bad_alloc&) {
    fail(ErrorCode::kOutOfMemory,
         "no memory for the activations of {} tokens at a time; choose a smaller ubatch",
         options.ubatch);
  }
}

}  // namespace nibble::cpu
