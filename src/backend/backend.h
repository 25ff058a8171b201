#pragma once
// What a device does with a plan.

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/kv_store.h"
#include "backend/plan.h"
#include "backend/sampling.h"
#include "base/progress.h"

namespace nibble::backend {

// One session's part of a step.
struct BatchSequence {
  std::span<const TokenId> tokens;      // run at positions kv->length(), kv->length() + 1, ...
  const KvSequence* kv;                 // prepared for them
  uint32_t logit_rows = 0;              // logits of the last so many tokens are wanted on the host
  std::optional<SampleRequest> sample;  // draw a token from the last token's logits
};

// One step: prefill chunks and decode rows of several sessions side by side.
struct Batch {
  std::span<const BatchSequence> sequences;  // no KvSequence twice, none without tokens
  // Asked between steps of the plan; true abandons the batch with Error(kCancelled). May be empty.
  std::function<bool()> stop;
  // For tests and debugging: after step `step`, the residual or output rows it wrote,
  // [tokens of the batch, width]. May be empty.
  std::function<void(size_t step, ValueId value, std::span<const float> rows)> observe;
};

struct BatchResult {
  std::vector<float> logits;     // [sum of logit_rows, vocabulary], in the batch's order
  std::vector<TokenId> sampled;  // per sequence that asked, in the batch's order
};

struct BackendOptions {
  KvOptions kv;
  WeightStorage weights = WeightStorage::kPacked;  // one that the backend has
  uint32_t ubatch = 512;                           // most tokens in one batch
  uint32_t threads = 0;                            // 0: one per core
  uint32_t device = 0;
  std::vector<uint32_t> max_kv_pages;  // per group of make_kv_groups(plan, kv)
  bool graphs = true;  // replay captured steps where the device can; the results are the same
};

struct MemoryUse {
  uint64_t weights_bytes = 0;    // the mapping's pages count as weights, too
  uint64_t kv_bytes = 0;         // taken so far
  uint64_t workspace_bytes = 0;  // activations and scratch
};

// One kind of work of the profiled steps.
struct ProfileEntry {
  std::string kind;
  uint64_t calls;
  double us;       // in all
  uint64_t bytes;  // of weights read in all; 0: not counted
  double flops;    // multiplications and additions of matrices, in all; 0: not counted
};

// A plan, loaded and ready on one device. Not thread-safe: one run at a time.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual std::string description() const = 0;  // "cpu: Intel Xeon, 4 threads, avx512"
  virtual KvStore& kv() = 0;
  virtual MemoryUse memory() const = 0;

  // Runs all steps for the batch's tokens, at most options.ubatch of them, and stores their keys
  // and values; the caller commits the sequences afterwards. After an Error the prepared
  // positions are undefined, the committed ones as before.
  virtual void run(const Batch& batch, BatchResult& result) = 0;

  // Bytes per second that the device reads from the memory where weights lie with nothing else to
  // do, measured now; 0 where that is the host's memory.
  virtual double read_bandwidth() { return 0; }
  // Multiplications and additions per second that the device's matrix units do with nothing else to
  // do, measured now; 0 where a profile has none to compare with.
  virtual double matrix_rate() { return 0; }
  // Between set_profiling(true) and set_profiling(false) every piece of work is timed by itself,
  // which slows the whole down; profile() is what came out. Empty where a backend has none.
  virtual void set_profiling(bool /*on*/) {}
  virtual std::vector<ProfileEntry> profile() { return {}; }
};

}  // namespace nibble::backend
