#include "cpu/attention/attention.h"

#include <algorithm>
#include <utility>
#include <variant>

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble::cpu {

using backend::AttendStep;
using backend::AttentionShape;
using backend::kKvPageTokens;
using backend::KvFormat;
using backend::SharedKvRow;

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

// Calls body(d, key_place, value_place, count) for the runs of dimensions that stay together.
template <class Body>
void for_each_run(const SharedKvRow& row, const Body& body) {
  const uint32_t half = row.head_dim / 2, rope_half = row.rope_dims / 2;
  const auto run = [&](uint32_t d, uint32_t count) {
    if (count != 0) body(d, row.key_place(d), row.value_place(d), count);
  };
  for (const uint32_t first : {0u, half}) {
    run(first, rope_half);
    run(first + rope_half, half - rope_half);
  }
}

}  // namespace

struct Attention::Job {
  const AttendStep& step;
  const AttentionKernels& kernels;
  const Rows& rows;
  uint32_t window;
  const float* query;
  float* output;

  const AttentionShape& shape() const { return step.shape; }
  uint32_t first_visible(uint32_t position) const {
    return window == 0 || position < window ? 0 : position - window + 1;
  }
  // The block's queries, in `scratch` if they must be put in the rows' order.
  QueryBlock queries(const Block& block, ThreadScratch& scratch) const;
  void query_to_row(const float* query, float* row) const;
  // The sums to outputs. The queries are no longer needed.
  void finish(const Block& block, const QueryBlock& queries, const SoftmaxState& state,
              ThreadScratch& scratch) const;
  void output_from_row(float* row, float* output) const;
  size_t row_offset(const Block& block, uint32_t row) const {
    const size_t token = block.sequence->first_row + block.first_token + row / block.heads;
    return token * shape().query_width() +
           size_t{block.first_head + row % block.heads} * shape().head_dim;
  }
};

QueryBlock Attention::Job::queries(const Block& block, ThreadScratch& scratch) const {
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
    if (rows.as_heads()) continue;
    float* ordered = scratch.heads.data() + size_t{row} * result.head_dim;
    query_to_row(result.queries[row], ordered);
    result.queries[row] = ordered;
  }
  return result;
}

void Attention::Job::query_to_row(const float* query, float* row) const {
  const uint32_t head_dim = shape().head_dim;
  if (rows.layer->shared) {
    const uint32_t rope_dims = rows.layer->shared->rope_dims;
    for_each_run(*rows.layer->shared, [&](uint32_t d, uint32_t place, uint32_t, uint32_t count) {
      if (place < rope_dims || rows.shared_key_weight.empty()) {
        std::copy_n(query + d, count, row + place);
        return;
      }
      const float* weight = &rows.shared_key_weight[d];
      for (uint32_t i = 0; i < count; ++i) row[place + i] = query[d + i] * weight[i];
    });
  } else {
    std::copy_n(query, head_dim, row);
  }
  if (rows.rotated_block != 0) kernels.rotate(row, head_dim, rows.rotated_block);
}

void Attention::Job::finish(const Block& block, const QueryBlock& queries,
                            const SoftmaxState& state, ThreadScratch& scratch) const {
  float* outputs[kMaxBlockRows];
  for (uint32_t row = 0; row < queries.rows; ++row) {
    outputs[row] = rows.as_heads() ? output + row_offset(block, row)
                                   : scratch.heads.data() + size_t{row} * queries.head_dim;
  }
  kernels.finish(queries, state, outputs);
  if (rows.as_heads()) return;
  for (uint32_t row = 0; row < queries.rows; ++row) {
    output_from_row(outputs[row], output + row_offset(block, row));
  }
}

void Attention::Job::output_from_row(float* row, float* output) const {
  const uint32_t head_dim = shape().head_dim;
  if (rows.rotated_block != 0) kernels.rotate_back(row, head_dim, rows.rotated_block);
  if (!rows.layer->shared) {
    std::copy_n(row, head_dim, output);
    return;
  }
  const uint32_t begin = rows.layer->shared->value_begin();
  for_each_run(*rows.layer->shared, [&](uint32_t d, uint32_t, uint32_t place, uint32_t count) {
    std::copy_n(row + place - begin, count, output + d);
  });
}

Attention::Attention(Isa isa, ThreadPool& pool, const backend::Plan& plan,
                     const backend::HostKvStore& kv, backend::ChangeKvRow change)
    : isa_(isa), pool_(pool), kv_(kv), change_row_(std::move(change)) {
  uint32_t most_row_values = 0;
  for (const backend::KvPlace place : kv_places(plan, kv.groups())) {
    const backend::KvLayer& layer = kv.groups()[place.group].layers[place.layer];
    rows_.push_back({.group = place.group,
                     .layer = &layer,
                     .shared_key_weight = backend::shared_key_weight(plan, layer.cache),
                     .rotated_block = layer.row.format == KvFormat::kTq4 ? layer.row.block : 0});
    most_row_values = std::max(most_row_values, layer.row.values);
  }
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
                        .tile = AlignedArray<float>(tile_floats(head_dim)),
                        .span_state = AlignedArray<float>(state),
                        .state = AlignedArray<float>(state),
                        .heads = AlignedArray<float>(size_t{kMaxBlockRows} * head_dim),
                        .row = AlignedArray<float>(most_row_values)});
    scratch_.back().kernels.data()->tile = scratch_.back().tile.data();
  }
}

uint64_t Attention::workspace_bytes() const {
  uint64_t total = partials_.bytes();
  for (const ThreadScratch& scratch : scratch_) {
    total += scratch.kernels.bytes() + scratch.tile.bytes() + scratch.span_state.bytes() +
             scratch.state.bytes() + scratch.heads.bytes() + scratch.row.bytes();
  }
  return total;
}

void Attention::store(backend::KvId cache, const backend::KvSequence& kv, uint32_t position,
                      uint32_t kv_head, float* key, float* value, uint32_t thread) {
  const Rows& rows = rows_[cache.value];
  const backend::KvLayer& layer = *rows.layer;
  const backend::KvRowLayout& row = layer.row;
  const AttentionKernels& kernels = attention_kernels(isa_, row.values);
  const backend::PageId page = kv.table(rows.group)[position / kKvPageTokens];
  const auto store_row = [&](float* values, uint64_t part_offset) {
    if (change_row_) change_row_(kv_.groups()[rows.group].window, {values, row.values});
    std::byte* head = kv_.page(rows.group, page) + part_offset + kv_head * row.head_bytes();
    const size_t index = position % kKvPageTokens;
    kernels.store[size_t(row.format)](
        values, row.values, row.block, head + index * row.number_bytes(),
        reinterpret_cast<uint16_t*>(head + row.scales_offset()) + index * row.scales());
  };
  if (!layer.shared) {
    store_row(key, layer.key_offset);
    store_row(value, layer.value_offset);
    return;
  }
  float* shared = scratch_[thread].row.data();
  for_each_run(*layer.shared,
               [&](uint32_t d, uint32_t key_place, uint32_t value_place, uint32_t count) {
                 std::copy_n(key + d, count, shared + key_place);
                 std::copy_n(value + d, count, shared + value_place);  // over it where both agree
               });
  store_row(shared, layer.key_offset);
}

void Attention::run(const AttendStep& step, std::span<const BatchRows> sequences,
                    const float* query, float* output) {
  const Rows& rows = rows_[step.cache.value];
  const Job job{step,  attention_kernels(isa_, step.shape.head_dim),
                rows,  kv_.groups()[rows.group].window,
                query, output};
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
  const QueryBlock queries = job.queries(block, scratch);
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
  job.finish(block, queries, state, scratch);
}

void Attention::merge_spans(const Job& job, const Block& block, ThreadScratch& scratch) const {
  const QueryBlock queries = job.queries(block, scratch);
  const uint32_t head_dim = queries.head_dim;
  const SoftmaxState state = state_at(scratch.state.data(), queries.rows, head_dim);
  job.kernels.clear(queries, state);
  for (uint32_t span = 0; span < block.spans(); ++span) {
    float* memory = block.partial + span * state_floats(queries.rows, head_dim);
    job.kernels.merge(queries, state_at(memory, queries.rows, head_dim), state);
  }
  job.finish(block, queries, state, scratch);
}

void Attention::attend_span(const Job& job, const Block& block, const QueryBlock& queries,
                            uint32_t span_index, ThreadScratch& scratch,
                            const SoftmaxState& state) const {
  const backend::KvLayer& layer = *job.rows.layer;
  const backend::KvRowLayout& row = layer.row;
  const std::vector<backend::PageId>& table = block.sequence->kv->table(job.rows.group);
  // Where the value begins in a row: in bytes of numbers, and in scales.
  const uint32_t value_begin = layer.shared ? layer.shared->value_begin() : 0;
  const uint64_t value_number = uint64_t{value_begin} * row.number_bytes() / row.values;
  const uint64_t value_scale = row.block == 0 ? 0 : value_begin / row.block;

  KvSpan span;
  span.first = (block.first_span() + span_index) * kSpanTokens;
  span.begin = std::max(span.first, block.begin);
  span.end = std::min(span.first + kSpanTokens, block.end);
  span.row_bytes = row.number_bytes();
  span.row_scales = row.scales();
  span.block = row.block;
  for (uint32_t page = span.begin / kKvPageTokens; page * kKvPageTokens < span.end; ++page) {
    NIBBLE_CHECK(table[page] != backend::kNoPage);
    const std::byte* head =
        kv_.page(job.rows.group, table[page]) + block.kv_head * row.head_bytes();
    const uint32_t at = page % kSpanPages;
    const auto set = [&](KvSpan::Rows& rows, const std::byte* first, uint64_t number,
                         uint64_t scale) {
      rows.numbers[at] = first + number;
      rows.scales[at] = reinterpret_cast<const uint16_t*>(first + row.scales_offset()) + scale;
    };
    set(span.keys, head + layer.key_offset, 0, 0);
    set(span.values, head + layer.value_offset, value_number, value_scale);
  }
  job.kernels.attend[size_t(row.format)](queries, span, *scratch.kernels.data(), state);
}

}  // namespace nibble::cpu
