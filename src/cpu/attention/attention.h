#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "backend/host_kv_store.h"
#include "backend/kv_codec.h"
#include "backend/plan.h"
#include "base/aligned_array.h"
#include "base/thread_pool.h"
#include "cpu/attention/kernels.h"
#include "cpu/isa.h"

namespace nibble::cpu {

// A sequence's part of a batch: consecutive rows at consecutive positions.
struct BatchRows {
  const backend::KvSequence* kv;
  uint32_t first_row;
  uint32_t rows;
  uint32_t first_position;
};

// Attention over paged keys and values. Work and memory traffic are bounded by what the rows can
// see: pages before a window are never touched. A row's result depends on its query, its keys and
// values and the instruction set only, to the bit (attention/kernels.h).
class Attention {
 public:
  // Takes all memory that the plan's AttendSteps need.
  Attention(Isa isa, ThreadPool& pool, const backend::Plan& plan, const backend::HostKvStore& kv,
            backend::ChangeKvRow change = {});

  void run(const backend::AttendStep& step, std::span<const BatchRows> sequences,
           const float* query,  // [rows, query_width]
           float* output);      // [rows, query_width]

  // Stores one head's key and value at a position that `kv` is prepared for; [head_dim] each. Both
  // are changed. `thread` is the pool's, or any while the pool is idle.
  void store(backend::KvId cache, const backend::KvSequence& kv, uint32_t position,
             uint32_t kv_head, float* key, float* value, uint32_t thread);

  uint64_t workspace_bytes() const;

 private:
  struct Job;

  // Where a layer's rows lie, and how its heads become rows.
  struct Rows {
    uint32_t group;
    const backend::KvLayer* layer;
    std::span<const float> shared_key_weight;
    uint32_t rotated_block;  // of tq4; else 0

    bool as_heads() const { return !layer->shared && rotated_block == 0; }
  };

  // Rows that one thread takes through a span: some tokens of a sequence, some query heads of a KV
  // head.
  struct Block {
    const BatchRows* sequence = nullptr;
    uint32_t first_token = 0, tokens = 0;
    uint32_t kv_head = 0, first_head = 0, heads = 0;
    uint32_t begin = 0, end = 0;  // positions that any of its rows sees
    float* partial = nullptr;     // states of its spans, where different threads compute them

    uint32_t rows() const { return tokens * heads; }
    uint32_t first_span() const { return begin / kSpanTokens; }
    uint32_t spans() const { return (end - 1) / kSpanTokens + 1 - first_span(); }
  };
  static constexpr uint32_t kAllSpans = UINT32_MAX;
  struct Task {
    uint32_t block;
    uint32_t span;  // kAllSpans: one after the other, to the final result
  };
  struct ThreadScratch {
    AlignedArray<AttentionScratch> kernels;  // one
    AlignedArray<float> tile, span_state, state;
    AlignedArray<float> heads;  // [kMaxBlockRows, head_dim], queries or outputs in the rows' order
    AlignedArray<float> row;    // one to be stored
  };

  void list_blocks(const Job& job, std::span<const BatchRows> sequences);
  void list_tasks(const Job& job);
  void run_task(const Job& job, const Task& task, ThreadScratch& scratch) const;
  void merge_spans(const Job& job, const Block& block, ThreadScratch& scratch) const;
  void attend_span(const Job& job, const Block& block, const QueryBlock& queries, uint32_t span,
                   ThreadScratch& scratch, const SoftmaxState& state) const;

  const Isa isa_;
  ThreadPool& pool_;
  const backend::HostKvStore& kv_;
  const backend::ChangeKvRow change_row_;
  std::vector<Rows> rows_;              // [cache]
  std::vector<ThreadScratch> scratch_;  // [thread]
  AlignedArray<float> partials_;
  std::vector<Block> blocks_;
  std::vector<Task> tasks_;
};

}  // namespace nibble::cpu
