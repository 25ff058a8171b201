#include <algorithm>
#include <new>

#include "base/error.h"
#include "engine/engine.h"
#include "engine/scheduler.h"

namespace nibble::engine {
namespace {

// A prompt's snapshot stands this many tokens before its end: chat templates end a prompt with
// tokens (an empty thought, say) that they leave out once the turn is history.
constexpr uint32_t kRewrittenTokens = 16;

}  // namespace

Session::Session(Scheduler& scheduler) : scheduler_(scheduler), kv_(scheduler.backend().kv()) {
  sampling_.temperature = 0;
  snapshots_.reserve(scheduler.limits().snapshots);
}

Session::~Session() {
  std::erase(scheduler_.sessions_, this);
}

void Session::set_sampling(const backend::SamplingParams& params) {
  params.validate(scheduler_.limits().vocabulary);
  sampling_ = params;
}

void Session::feed(std::span<const TokenId> tokens, uint32_t logit_rows) {
  require_usable();
  check_tokens(tokens_.size() + tokens.size(), tokens, logit_rows);
  std::vector<float> logits;
  try {
    logits.reserve(size_t{logit_rows} * scheduler_.limits().vocabulary);
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
  } catch (const std::bad_alloc&) {
    fail(ErrorCode::kOutOfMemory, "no memory for {} rows of {} logits; ask for fewer at a time",
         logit_rows, scheduler_.limits().vocabulary);
  }
  logits_ = std::move(logits);
  logit_rows_ = logit_rows;
  const size_t rewritten = std::min<size_t>(tokens.size(), kRewrittenTokens);
  snapshot_at_ = tokens.size() == 1 ? 0 : static_cast<uint32_t>(tokens_.size() - rewritten);
  next_token_.reset();
}

void Session::extend(std::span<const TokenId> tokens, uint32_t logit_rows,
                     const Progress& progress) {
  feed(tokens, logit_rows);
  const size_t total = pending();
  Session* const alone[] = {this};
  while (pending() != 0) {
    scheduler_.step(alone);
    if (error_) throw *error_;
    if (progress) progress("prefill", total - pending(), total);
  }
}

uint32_t Session::sync(std::span<const TokenId> prefix, uint32_t logit_rows,
                       const Progress& progress) {
  require_usable();
  check_tokens(prefix.size(), prefix, logit_rows);
  const auto cached = tokens();
  const auto differ = std::mismatch(cached.begin(), cached.end(), prefix.begin(), prefix.end());
  const auto common = static_cast<size_t>(differ.second - prefix.begin());
  const size_t rerun = std::max(logit_rows, 1u);
  const uint32_t reused = truncate(static_cast<uint32_t>(std::min(common, prefix.size() - rerun)));
  take_snapshot();
  extend(prefix.subspan(reused), logit_rows, progress);
  return reused;
}

uint32_t Session::truncate(uint32_t length) {
  require_usable();
  drop_pending();
  if (length >= kv_.length()) return kv_.length();
  if (!kv_.can_truncate(length)) {
    // The first that serves, from the longest, leads back to the most.
    const auto serves = [&](const backend::KvSequence& snapshot) {
      return snapshot.can_truncate(std::min(length, snapshot.length()));
    };
    const auto snapshot = std::find_if(snapshots_.rbegin(), snapshots_.rend(), serves);
    if (snapshot == snapshots_.rend()) {
      length = 0;
    } else {
      kv_ = *snapshot;
      length = std::min(length, kv_.length());
    }
  }
  kv_.truncate(length);
  tokens_.resize(length);
  std::erase_if(snapshots_, [&](const auto& snapshot) { return snapshot.length() > length; });
  next_token_.reset();
  logits_.clear();
  return length;
}

std::span<const float> Session::logits() const {
  if (pending() != 0) return {};
  return logits_;
}

TokenId Session::next_token() const {
  if (!next_token_) {
    fail(ErrorCode::kInvalidArgument, "no token has been drawn yet: feed tokens and run them");
  }
  return *next_token_;
}

void Session::reset() {
  kv_.truncate(0);
  snapshots_.clear();
  tokens_.clear();
  next_token_.reset();
  logits_.clear();
  cancelled_ = false;
  error_.reset();
}

void Session::require_usable() {
  if (error_ && error_->code() != ErrorCode::kCancelled) {
    fail(ErrorCode::kSessionUnusable, "this session failed and must be reset: {}", error_->what());
  }
  error_.reset();
}

// Whether `tokens` may become the last of `length`.
void Session::check_tokens(size_t length, std::span<const TokenId> tokens,
                           uint32_t logit_rows) const {
  const uint32_t context = scheduler_.limits().context;
  const uint32_t vocabulary = scheduler_.limits().vocabulary;
  if (tokens.empty()) fail(ErrorCode::kInvalidArgument, "there are no tokens to run");
  if (length > context) {
    fail(ErrorCode::kContextFull,
         "{} tokens asked for, the context holds {}; open the model with a larger context (-c) or "
         "start anew",
         length, context);
  }
  for (TokenId token : tokens) {
    if (token.value < 0 || static_cast<uint32_t>(token.value) >= vocabulary) {
      fail(ErrorCode::kInvalidArgument, "token {} is not in the vocabulary of {} tokens",
           token.value, vocabulary);
    }
  }
  if (logit_rows > tokens.size()) {
    fail(ErrorCode::kInvalidArgument, "logits of the last {} tokens asked for, but only {} given",
         logit_rows, tokens.size());
  }
}

void Session::drop_pending() {
  if (pending() != 0) logits_.clear();  // rows of a part are no use
  tokens_.resize(kv_.length());
}

void Session::take_snapshot() {
  const bool taken = !snapshots_.empty() && snapshots_.back().length() == kv_.length();
  const uint32_t most = scheduler_.limits().snapshots;
  if (kv_.length() == 0 || taken || most == 0) return;
  if (snapshots_.size() == most) snapshots_.erase(snapshots_.begin());
  try {
    snapshots_.push_back(kv_);
  } catch (const std::bad_alloc&) {
    return;  // no result depends on it
  }
  snapshots_.back().truncate(kv_.length());  // lets go of pages that are only prepared
}

backend::BatchSequence Session::chunk(uint32_t count) const {
  const size_t end = kv_.length() + count;
  const size_t first_row = tokens_.size() - logit_rows_;
  backend::BatchSequence chunk{.tokens = std::span(tokens_).subspan(kv_.length(), count),
                               .kv = &kv_,
                               .logit_rows = 0,
                               .sample = {}};
  if (end > first_row) {
    chunk.logit_rows = static_cast<uint32_t>(std::min<size_t>(count, end - first_row));
  }
  if (end == tokens_.size()) {
    const size_t recent = std::min<size_t>(end, sampling_.penalty_window);
    chunk.sample = {
        .params = &sampling_, .position = end, .recent = std::span(tokens_).last(recent)};
  }
  return chunk;
}

void Session::complete(const backend::BatchSequence& chunk, std::span<const float> logits,
                       TokenId sampled) {
  auto count = static_cast<uint32_t>(chunk.tokens.size());
  logits_.insert(logits_.end(), logits.begin(), logits.end());
  if (chunk.sample) next_token_ = sampled;
  const uint32_t begin = kv_.length();
  if (begin <= snapshot_at_ && snapshot_at_ < begin + count) {
    kv_.commit(snapshot_at_ - begin);
    take_snapshot();
    count -= snapshot_at_ - begin;
  }
  kv_.commit(count);
}

void Session::fail_step(const Error& error) {
  drop_pending();
  error_ = error;
}

}  // namespace nibble::engine
