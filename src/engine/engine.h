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

class Scheduler;
class Session;

// The start of a turn and the end of its prompt.
inline constexpr uint32_t kTurnSnapshots = 2;

struct EngineOptions {
  std::string backend = "auto";  // "auto", "cuda" (where this build has it), "cpu", "reference"
  std::optional<backend::WeightStorage> weights;  // nullopt: the faster one that the backend has
  std::optional<backend::KvFormat> kv_format;     // nullopt: kv_options() decides
  // Of layers with a sliding window, which are small; nullopt: f32 if the others are, else f16.
  std::optional<backend::KvFormat> kv_window_format;
  backend::KvLayout kv_layout = backend::KvLayout::kAuto;
  uint32_t context = 0;   // most tokens of a session; 0: trained context or what fits
  uint32_t sessions = 1;  // sessions of that context that memory must serve
  uint32_t threads = 0;   // 0: one per core
  uint32_t ubatch = 0;    // most tokens of one step; 0: default_ubatch()
  uint32_t device = 0;
  // States of its cache that each session keeps to go back to (Session::truncate), as far as memory
  // has room for them; 0 where no session ever goes back.
  uint32_t snapshots = kTurnSnapshots;
};

// What follows takes backends' names as EngineOptions has them, "cuda" also where this build or
// machine has none, and throws Error as open() does on others.

// Most tokens of one step where options leave it open.
uint32_t default_ubatch(std::string_view backend);
// In which formats a backend stores keys and values; its default first. None for other names.
std::span<const backend::KvFormat> kv_formats(std::string_view backend);
// How open() stores them. A format left open becomes the default; but q8 instead of f16 if more
// than kLongContext tokens are asked for and the model allows it, since it costs half the bytes and
// next to nothing else (docs/formats/kv-quality.md).
inline constexpr uint32_t kLongContext = 8192;
backend::KvOptions kv_options(const backend::Plan& plan, const EngineOptions& options);
// The same with each format that backend and model allow.
std::vector<backend::KvOptions> kv_choices(const backend::Plan& plan, EngineOptions options);

// Bytes that a model needs on a backend once its sessions, with snapshots, have filled their
// contexts. Cache is taken as they grow, the rest when the model is opened.
struct MemoryNeeds {
  uint64_t weights_bytes;
  uint64_t kv_bytes;
  uint64_t workspace_bytes;
  uint64_t driver_bytes;  // about what a device's driver takes for itself
  uint64_t total() const;
};
// Computed without loading or a device. Context 0 is the trained one.
MemoryNeeds memory_needs(const backend::Plan& plan, const EngineOptions& options);

// One model on one device, shared by its sessions, which it must outlive. Not thread-safe, except
// Session::cancel.
class Engine {
 public:
  // Throws Error; kOutOfMemory says before loading what is needed, what is free and what would fit.
  static std::unique_ptr<Engine> open(const std::filesystem::path& path,
                                      const EngineOptions& options, const Progress& progress = {});
  ~Engine();

  const gguf::GgufFile& file() const;
  const backend::Plan& plan() const;
  const text::Tokenizer* tokenizer() const;     // nullptr: the file has none
  const text::ChatFormat* chat_format() const;  // nullptr: none that we know
  backend::Backend& backend();
  uint32_t context() const;  // most tokens of one session
  uint32_t ubatch() const;
  // From `general.sampling.*`, else temperature 1, top-k 64, top-p 0.95.
  const backend::SamplingParams& default_sampling() const;

  std::unique_ptr<Session> new_session();

  // One step for all `sessions` together: of each, pending tokens in order, as many as the step's
  // token budget (ubatch) allows, at least one of each while the budget lasts. Returns whether any
  // session still has pending tokens. A session that fails (out of pages, cancelled) gets its
  // error (Session::error) and the others go on; when the device fails, all that took part get it.
  bool step(std::span<Session* const> sessions);

 private:
  struct Parts;
  explicit Engine(std::unique_ptr<Parts> parts);
  std::unique_ptr<Parts> parts_;
};

// One conversation. Sessions are isolated: what one does changes nothing that another sees.
class Session {
 public:
  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // Tokens whose keys and values are in the cache, in order.
  std::span<const TokenId> tokens() const { return std::span(tokens_).first(kv_.length()); }

  // Sets how next_token() is drawn by the steps that follow; greedy at first. Throws as
  // SamplingParams::validate does.
  void set_sampling(const backend::SamplingParams& params);

  // Queues tokens (at least one) behind those in the cache without running anything. logit_rows:
  // of how many of the last ones logits() shall have rows. Throws Error(kContextFull) with both
  // numbers, kSessionUnusable after an error, kInvalidArgument on ids outside the vocabulary; then
  // nothing has changed.
  void feed(std::span<const TokenId> tokens, uint32_t logit_rows = 0);
  size_t pending() const { return tokens_.size() - kv_.length(); }

  // feed() and run until nothing is pending; throws this session's error, if any.
  void extend(std::span<const TokenId> tokens, uint32_t logit_rows = 0,
              const Progress& progress = {});

  // Makes the cache hold exactly `prefix` (not empty), reusing the longest common part that the
  // cache still has in full, and returns how many tokens were reused. The result equals that of a
  // fresh session. At least the last token is always run, so that next_token() is fresh.
  uint32_t sync(std::span<const TokenId> prefix, uint32_t logit_rows = 0,
                const Progress& progress = {});

  // Drops pending tokens and goes back to at most `length` tokens: to `length` exactly where the
  // cache still has what that needs, else to the nearest earlier snapshot, else to 0. Returns the
  // length reached.
  uint32_t truncate(uint32_t length);

  // The token drawn after the last token fed; Error(kInvalidArgument) while any is pending.
  TokenId next_token() const;
  // [logit_rows, vocabulary] of the last feed; empty while any token is pending.
  std::span<const float> logits() const;

  // May be called from any thread: the running or next step of this session stops with
  // Error(kCancelled). What was in the cache before that step stays usable; pending tokens are
  // dropped.
  void cancel() noexcept { cancelled_ = true; }
  // Takes back a cancel() that no step has heard.
  void forget_cancel() noexcept { cancelled_ = false; }

  // The error that a step gave this session; empty when all is well. Any error but kCancelled
  // makes the session unusable until reset().
  const std::optional<Error>& error() const { return error_; }
  // Forgets all tokens, any error and an unheard cancel().
  void reset();

 private:
  friend class Scheduler;
  explicit Session(Scheduler& scheduler);

  void require_usable();
  void check_tokens(size_t length, std::span<const TokenId> tokens, uint32_t logit_rows) const;
  void drop_pending();
  void take_snapshot();

  // For the scheduler: the next `count` pending tokens, and what becomes of them.
  backend::BatchSequence chunk(uint32_t count) const;
  void complete(const backend::BatchSequence& chunk, std::span<const float> logits,
                TokenId sampled);
  void fail_step(const Error& error);

  Scheduler& scheduler_;
  backend::SamplingParams sampling_;
  std::vector<TokenId> tokens_;  // in the cache, then pending
  backend::KvSequence kv_;
  std::vector<backend::KvSequence> snapshots_;  // of prefixes of tokens_, shortest first
  uint32_t logit_rows_ = 0;                     // wanted of the last tokens in tokens_
  uint32_t snapshot_at_ = 0;                    // where the running prompt leaves one; 0: nowhere
  uint64_t last_step_ = 0;                      // when the scheduler last chose this session
  std::optional<TokenId> next_token_;
  std::vector<float> logits_;
  std::atomic<bool> cancelled_ = false;
  std::optional<Error> error_;
};

}  // namespace nibble::engine
