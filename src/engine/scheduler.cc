#include "engine/scheduler.h"

#include <algorithm>
#include <exception>
#include <new>

#include "base/error.h"

namespace nibble::engine {
namespace {

// What the exception that is being handled means to the sessions whose step it ended.
Error step_error() {
  try {
    throw;
  } catch (const Error& error) {
    return error;
  } catch (const std::bad_alloc&) {
    return Error(ErrorCode::kOutOfMemory, "no memory left in the middle of a step");
  } catch (const std::exception& error) {
    return Error(ErrorCode::kDevice, error.what());
  }
}

}  // namespace

std::unique_ptr<Session> Scheduler::new_session() {
  sessions_.reserve(sessions_.size() + 1);
  std::unique_ptr<Session> session(new Session(*this));
  sessions_.push_back(session.get());
  return session;
}

bool Scheduler::step(std::span<Session* const> sessions) {
  ++steps_;
  std::vector<Share> prepared;
  for (const Share& share : share_budget(sessions)) {
    try {
      prepare(share.session->kv_, share.tokens);
      prepared.push_back(share);
    } catch (const std::exception&) {
      share.session->fail_step(step_error());
    }
  }
  if (!prepared.empty()) run(prepared);
  return std::any_of(sessions.begin(), sessions.end(),
                     [](const Session* session) { return session->pending() != 0; });
}

// Max-min fair: nobody gets less than an equal share unless he needs less, and what one leaves goes
// to the others.
std::vector<Scheduler::Share> Scheduler::share_budget(std::span<Session* const> sessions) {
  std::vector<Session*> ready;
  for (Session* session : sessions) {
    if (&session->scheduler_ != this) {
      fail(ErrorCode::kInvalidArgument, "a session was given to another engine's step");
    }
    const bool twice = std::find(ready.begin(), ready.end(), session) != ready.end();
    if (session->pending() == 0 || twice) continue;
    if (session->cancelled_.exchange(false)) {
      session->fail_step(Error(ErrorCode::kCancelled, "cancelled"));
    } else {
      ready.push_back(session);
    }
  }
  if (ready.size() > limits_.ubatch) {  // who waited longest comes first
    std::stable_sort(ready.begin(), ready.end(), [](const Session* a, const Session* b) {
      return a->last_step_ < b->last_step_;
    });
    ready.resize(limits_.ubatch);
  }
  std::stable_sort(ready.begin(), ready.end(),
                   [](const Session* a, const Session* b) { return a->pending() < b->pending(); });
  std::vector<Share> shares;
  size_t budget = limits_.ubatch;
  for (size_t i = 0; i < ready.size(); ++i) {
    const size_t tokens = std::min(ready[i]->pending(), budget / (ready.size() - i));
    shares.push_back({ready[i], static_cast<uint32_t>(tokens)});
    budget -= tokens;
    ready[i]->last_step_ = steps_;
  }
  return shares;
}

void Scheduler::prepare(backend::KvSequence& kv, uint32_t tokens) {
  try {
    kv.prepare(tokens);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kOutOfMemory || !drop_snapshots()) throw;
    kv.prepare(tokens);
  }
}

// A snapshot saves time when a session goes back; no result depends on it. Whether there were any.
bool Scheduler::drop_snapshots() {
  bool any = false;
  for (Session* session : sessions_) {
    any |= !session->snapshots_.empty();
    session->snapshots_.clear();
  }
  return any;
}

void Scheduler::run(std::span<const Share> shares) {
  const auto fail_all = [&](const Error& error) {
    for (const Share& share : shares) {
      share.session->cancelled_ = false;
      share.session->fail_step(error);
    }
  };
  std::vector<backend::BatchSequence> chunks;
  for (const Share& share : shares) chunks.push_back(share.session->chunk(share.tokens));
  const backend::Batch batch{
      .sequences = chunks,
      .stop =
          [&] {
            return std::all_of(shares.begin(), shares.end(),
                               [](const Share& share) { return share.session->cancelled_.load(); });
          },
      .observe = {}};
  backend::BatchResult result;
  try {
    backend_.run(batch, result);
  } catch (const std::exception&) {
    return fail_all(step_error());
  }

  std::span<const float> logits(result.logits);
  auto sampled = result.sampled.begin();
  for (size_t i = 0; i < shares.size(); ++i) {
    Session& session = *shares[i].session;
    const size_t floats = size_t{chunks[i].logit_rows} * limits_.vocabulary;
    const TokenId token = chunks[i].sample ? *sampled++ : TokenId{};
    if (session.cancelled_.exchange(false)) {  // while others still wanted the step
      session.fail_step(Error(ErrorCode::kCancelled, "cancelled"));
    } else if (token == backend::kNoToken) {
      session.fail_step(Error(ErrorCode::kMalformedFile,
                              "the model gives no token a logit that is a number: its weights hold "
                              "NaN, infinities or values too large to compute with; get the file "
                              "again, or try --kv f32"));
    } else {
      session.complete(chunks[i], logits.first(floats), token);
    }
    logits = logits.subspan(floats);
  }
}

}  // namespace nibble::engine
