#pragma once
// The library's front door: a GGUF file opened on a device, and conversations with it.

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "base/error.h"
#include "base/progress.h"
#include "gguf/gguf_file.h"
#include "text/chat.h"
#include "text/tokenizer.h"

namespace nibble::engine {

class Session;

struct EngineOptions {
  std::string backend = "auto";  // "auto", "cpu", "reference" ("cuda", "metal": not in this build)
  std::optional<backend::KvFormat> kv_format;  // nullopt: the backend's default (f16)
  uint32_t context = 0;   // most tokens of a session; 0: trained context or what fits
  uint32_t sessions = 1;  // sessions of that context that memory must serve
  uint32_t threads = 0;   // 0: one per core
  uint32_t ubatch = 0;    // most tokens of one step; 0: 512
  uint32_t device = 0;
};

// Bytes that a model needs on a backend, computed without loading it.
struct MemoryNeeds {
  uint64_t weights_bytes;
  uint64_t kv_bytes;  // with the whole context filled
  uint64_t workspace_bytes;
  uint64_t total() const { return weights_bytes + kv_bytes + workspace_bytes; }
};
MemoryNeeds memory_needs(const backend::Plan& plan, backend::KvFormat format, uint32_t context,
                         uint32_t ubatch);

// One model on one device, shared by its sessions. Not thread-safe, except Session::cancel.
class Engine {
 public:
  // Throws Error; kOutOfMemory says before loading what is needed, what is free and what would fit.
  static std::unique_ptr<Engine> open(const std::filesystem::path& path,
                                      const EngineOptions& options, const Progress& progress = {});
  virtual ~Engine() = default;

  virtual const gguf::GgufFile& file() const = 0;
  virtual const backend::Plan& plan() const = 0;
  virtual const text::Tokenizer* tokenizer() const = 0;     // nullptr: the file has none
  virtual const text::ChatFormat* chat_format() const = 0;  // nullptr: none that we know
  virtual backend::Backend& backend() = 0;
  virtual uint32_t context() const = 0;  // most tokens of one session
  virtual uint32_t ubatch() const = 0;
  // From `general.sampling.*`, else temperature 1, top-k 64, top-p 0.95.
  virtual backend::SamplingParams default_sampling() const = 0;

  virtual std::unique_ptr<Session> new_session() = 0;

  // One step for all `sessions` together: of each, pending tokens in order, as many as the step's
  // token budget (ubatch) allows, at least one of each while the budget lasts. Returns whether any
  // session still has pending tokens. A session that fails (out of pages, context full,
  // cancelled) gets its error (Session::error) and the others go on.
  virtual bool step(std::span<Session* const> sessions) = 0;
};

// One conversation. Sessions are isolated: what one does changes nothing that another sees.
class Session {
 public:
  virtual ~Session() = default;

  // Tokens whose keys and values are in the cache, in order.
  virtual std::span<const TokenId> tokens() const = 0;

  // Sets how next_token() is drawn by the steps that follow; greedy at first.
  virtual void set_sampling(const backend::SamplingParams& params) = 0;

  // Queues tokens behind those in the cache without running anything. logit_rows: of how many of
  // the last ones logits() shall have rows. Throws Error(kContextFull) with both numbers,
  // kSessionUnusable after an error, kInvalidArgument on ids outside the vocabulary.
  virtual void feed(std::span<const TokenId> tokens, uint32_t logit_rows = 0) = 0;
  virtual size_t pending() const = 0;

  // feed() and run until nothing is pending; throws this session's error, if any.
  virtual void extend(std::span<const TokenId> tokens, uint32_t logit_rows = 0,
                      const Progress& progress = {}) = 0;

  // Makes the cache hold exactly `prefix` (not empty), reusing the longest common part that the
  // cache still has in full, and returns how many tokens were reused. The result equals that of a
  // fresh session. At least the last token is always run, so that next_token() is fresh.
  virtual uint32_t sync(std::span<const TokenId> prefix, uint32_t logit_rows = 0,
                        const Progress& progress = {}) = 0;

  // Goes back to at most `length` tokens: to `length` exactly where the cache still has what
  // that needs, else to the nearest earlier snapshot, else to 0. Returns the length reached.
  virtual uint32_t truncate(uint32_t length) = 0;

  // The token drawn after the last token of the last completed step.
  virtual TokenId next_token() const = 0;
  // [logit_rows, vocabulary] of the last feed, once nothing is pending.
  virtual std::span<const float> logits() const = 0;

  // May be called from any thread: the running or next step of this session stops with
  // Error(kCancelled). What was in the cache before that step stays usable; pending tokens are
  // dropped.
  virtual void cancel() noexcept = 0;

  // The error that a shared step() gave this session; empty when all is well. Any error but
  // kCancelled makes the session unusable until reset().
  virtual const std::optional<Error>& error() const = 0;
  // Forgets all tokens and any error.
  virtual void reset() = 0;
};

}  // namespace nibble::engine
