#include "cpu/attention/attention.h"

#include <algorithm>
#include <variant>

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble::cpu {

using backend::AttendStep;
using backend::AttentionShape;
using backend::kKvPageTokens;
using backend::KvFormat;

const AttentionKernels& attention_kernels(Isa isa, uint32_t head_dim) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512 && head_dim % kAttentionAvx512.lanes == 0) return kAttentionAvx512;
  if (isa >= Isa::kAvx2 && head_dim % kAttentionAvx2.lanes == 0) return kAttentionAvx2;
#elif defined(__aarch64__)
  if (isa == Isa::kNeon && head_dim % kAttentionNeon.lanes == 0) return kAttentionNeon;
#endif
  (void)isa;
  return kAttentionScalar;
}

namespace {

// Partial states of one row over a context of 128K tokens at 32 heads of 512 take half of it.
constexpr uint64_t kMaxPartialFloats = uint64_t{8} << 20;

// Of one state, rounded up to keep the next one aligned.
size_t state_floats(size_t rows, size_t head_dim) {
  return round_up(rows * (head_dim + 2), size_t{16});
}

// A state of `rows` rows in memory of state_floats(): values first, for their alignment.
SoftmaxState state_at(float* memory, size_t rows, size_t head_dim) {
  float* maximum = memory + rows * head_dim;
  return {.maximum = maximum, .sum = maximum + rows, .values = memory};
}

}  // namespace

struct Attention::Job {
  const AttendStep& step;
  const AttentionKernels& kernels;
  uint32_t group_index;
  const backend::KvGroup& group;
  const backend::KvLayer& layer;
  const float* query;
  float* output;

  const AttentionShape& shape() const { return step.shape; }
  uint32_t first_visible(uint32_t position) const {
    return group.window == 0 || position < group.window ? 0 : position - group.window + 1;
  }
  QueryBlock queries(const Block& block) const;
  void finish(const Block& block, const QueryBlock& queries, const SoftmaxState& state) const;
  size_t row_offset(const Block& block, uint32_t row) const {
    const size_t token = block.sequence->first_row + block.first_token + row / block.heads;
    return token * shape().query_width() +
           size_t{block.first_head + row % block.heads} * shape().head_dim;
  }
};

QueryBlock Attention::Job::queries(const Block& block) const {
  QueryBlock result;
  result.rows = block.rows();
  result.head_dim = shape().head_dim;
  result.scale = step.scale;
  for (uint32_t row = 0; row < result.rows; ++row) {
    const uint32_t position =
        block.sequence->first_position + block.first_token + row / block.heads;
    result.queries[row] = query + row_offset(block, row);
    result.begin[row] = first_visible(position);
    result.end[row] = position + 1;
  }
  return result;
}

void Attention::Job::finish(const Block& block, const QueryBlock& queries,
                            const SoftmaxState& state) const {
  float* outputs[kMaxBlockRows];
  for (uint32_t row = 0; row < queries.rows; ++row) outputs[row] = output + row_offset(block, row);
  kernels.finish(queries, state, outputs);
}

Attention::Attention(Isa isa, ThreadPool& pool, const backend::Plan& plan,
                     const backend::HostKvStore& kv)
    : isa_(isa), pool_(pool), kv_(kv), places_(kv_places(plan, kv.groups())) {
  uint32_t head_dim = 0;
  uint64_t partial_floats = 0;
  for (const backend::Step& step : plan.steps) {
    const AttendStep* attend = std::get_if<AttendStep>(&step);
    if (attend == nullptr) continue;
    head_dim = std::max(head_dim, attend->shape.head_dim);
    // One token's states: over the window, which may lie across one span more, or the context.
    const uint32_t window = plan.cache(attend->cache).window;
    const uint64_t positions = window != 0 ? window : std::max(plan.trained_context, 1u);
    const uint64_t spans = ceil_div(positions, uint64_t{kSpanTokens}) + 1;
    partial_floats = std::max(
        partial_floats, spans * state_floats(attend->shape.query_heads, attend->shape.head_dim));
  }
  partials_ = AlignedArray<float>(std::min(partial_floats, kMaxPartialFloats));
  for (uint32_t thread = 0; thread < pool.size(); ++thread) {
    const size_t state = state_floats(kMaxBlockRows, head_dim);
    scratch_.push_back({.kernels = AlignedArray<AttentionScratch>(1),
                        .page = AlignedArray<float>(size_t{kKvPageTokens} * head_dim),
                        .span_state = AlignedArray<float>(state),
                        .state = AlignedArray<float>(state)});
    scratch_.back().kernels.data()->page = scratch_.back().page.data();
  }
}

uint64_t Attention::workspace_bytes() const {
  uint64_t total = partials_.bytes();
  for (const ThreadScratch& scratch : scratch_) {
    total += scratch.kernels.bytes() + scratch.page.bytes() + scratch.span_state.bytes() +
             scratch.state.bytes();
  }
  return total;
}

void Attention::run(const AttendStep& step, std::span<const BatchRows> sequences,
                    const float* query, float* output) {
  const backend::KvPlace place = places_[step.cache.value];
  const backend::KvGroup& group = kv_.groups()[place.group];
  const Job job{step,
                attention_kernels(isa_, step.shape.head_dim),
                place.group,
                group,
                group.layers[place.layer],
                query,
                output};
  list_blocks(job, sequences);
  list_tasks(job);
  pool_.for_each_chunk(tasks_.size(), 1, [&](size_t begin, size_t, uint32_t thread) {
    run_task(job, tasks_[begin], scratch_[thread]);
  });
  if (tasks_.size() == blocks_.size()) return;
  pool_.for_each_chunk(blocks_.size(), 1, [&](size_t begin, size_t, uint32_t thread) {
    if (blocks_[begin].partial != nullptr) merge_spans(job, blocks_[begin], scratch_[thread]);
  });
}

void Attention::list_blocks(const Job& job, std::span<const BatchRows> sequences) {
  const AttentionShape& shape = job.shape();
  const uint32_t group_heads = shape.query_heads / shape.kv_heads;
  uint32_t heads_per_block = std::min(group_heads, kMaxBlockRows);
  const uint32_t tokens_per_block = kMaxBlockRows / heads_per_block;

  // Query heads share the reads of their KV head, unless threads would have nothing to do.
  size_t units = 0;
  for (const BatchRows& s : sequences) {
    const uint32_t seen = s.first_position + s.rows - job.first_visible(s.first_position);
    units +=
        size_t{shape.kv_heads} * ceil_div(s.rows, tokens_per_block) * ceil_div(seen, kSpanTokens);
  }
  for (; units < pool_.size() && heads_per_block > 1; units *= 2) {
    heads_per_block = ceil_div(heads_per_block, 2u);
  }

  blocks_.clear();
  for (const BatchRows& s : sequences) {
    // Last tokens first: they see most, and a long task should not be the last to start.
    for (uint32_t i = ceil_div(s.rows, tokens_per_block); i-- > 0;) {
      Block block;
      block.sequence = &s;
      block.first_token = i * tokens_per_block;
      block.tokens = std::min(tokens_per_block, s.rows - block.first_token);
      const uint32_t position = s.first_position + block.first_token;
      block.begin = job.first_visible(position);
      block.end = position + block.tokens;
      for (block.kv_head = 0; block.kv_head < shape.kv_heads; ++block.kv_head) {
        for (uint32_t head = 0; head < group_heads; head += heads_per_block) {
          block.first_head = block.kv_head * group_heads + head;
          block.heads = std::min(heads_per_block, group_heads - head);
          blocks_.push_back(block);
        }
      }
    }
  }
}

// One task per block; or one per span, where blocks are few and have many, and memory suffices.
void Attention::list_tasks(const Job& job) {
  constexpr size_t kBlocksPerThread = 4;  // so many level out threads' differences
  const bool few_blocks = blocks_.size() < kBlocksPerThread * pool_.size();
  float* free = partials_.data();
  float* const end = free + partials_.bytes() / sizeof(float);
  tasks_.clear();
  for (uint32_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[i];
    const uint32_t spans = block.spans();
    const size_t needed = spans * state_floats(block.rows(), job.shape().head_dim);
    if (!few_blocks || spans == 1 || needed > size_t(end - free)) {
      tasks_.push_back({i, kAllSpans});
      continue;
    }
    block.partial = free;
    free += needed;
    for (uint32_t span = 0; span < spans; ++span) tasks_.push_back({i, span});
  }
}

void Attention::run_task(const Job& job, const Task& task, ThreadScratch& scratch) const {
  const Block& block = blocks_[task.block];
  const QueryBlock queries = job.queries(block);
  const uint32_t head_dim = queries.head_dim;
  if (task.span != kAllSpans) {
    float* memory = block.partial + task.span * state_floats(queries.rows, head_dim);
    attend_span(job, block, queries, task.span, scratch, state_at(memory, queries.rows, head_dim));
    return;
  }
  const SoftmaxState state = state_at(scratch.state.data(), queries.rows, head_dim);
  const SoftmaxState next = state_at(scratch.span_state.data(), queries.rows, head_dim);
  job.kernels.clear(queries, state);
  for (uint32_t span = 0; span < block.spans(); ++span) {
    attend_span(job, block, queries, span, scratch, next);
    job.kernels.merge(queries, next, state);
  }
  job.finish(block, queries, state);
}

void Attention::merge_spans(const Job& job, const Block& block, ThreadScratch& scratch) const {
  const QueryBlock queries = job.queries(block);
  const uint32_t head_dim = queries.head_dim;
  const SoftmaxState state = state_at(scratch.state.data(), queries.rows, head_dim);
  job.kernels.clear(queries, state);
  for (uint32_t span = 0; span < block.spans(); ++span) {
    float* memory = block.partial + span * state_floats(queries.rows, head_dim);
    job.kernels.merge(queries, state_at(memory, queries.rows, head_dim), state);
  }
  job.finish(block, queries, state);
}

void Attention::attend_span(const Job& job, const Block& block, const QueryBlock& queries,
                            uint32_t span_index, ThreadScratch& scratch,
                            const SoftmaxState& state) const {
  const bool f32 = job.layer.row.format == KvFormat::kF32;
  const size_t head_bytes =
      size_t{kKvPageTokens} * queries.head_dim * (f32 ? sizeof(float) : sizeof(uint16_t));
  const std::vector<backend::PageId>& table = block.sequence->kv->table(job.group_index);

  KvSpan span;
  span.first = (block.first_span() + span_index) * kSpanTokens;
  span.begin = std::max(span.first, block.begin);
  span.end = std::min(span.first + kSpanTokens, block.end);
  for (uint32_t page = span.begin / kKvPageTokens; page * kKvPageTokens < span.end; ++page) {
    NIBBLE_CHECK(table[page] != backend::kNoPage);
    const std::byte* bytes = kv_.page(job.group_index, table[page]) + block.kv_head * head_bytes;
    span.keys[page % kSpanPages] = bytes + job.layer.key_offset;
    span.values[page % kSpanPages] = bytes + job.layer.value_offset;
  }
  const auto attend = f32 ? job.kernels.attend_f32 : job.kernels.attend_f16;
  attend(queries, span, *scratch.kernels.data(), state);
}

}  // namespace nibble::cpu
