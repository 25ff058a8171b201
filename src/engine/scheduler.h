#pragma once
// Which tokens of which sessions run in the next step.

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "backend/backend.h"
#include "engine/engine.h"

namespace nibble::engine {

// Sessions on one backend. Must outlive them.
class Scheduler {
 public:
  struct Limits {
    uint32_t vocabulary;
    uint32_t context;                     // tokens of one session
    uint32_t ubatch;                      // tokens of one step
    uint32_t snapshots = kTurnSnapshots;  // of one session
  };

  Scheduler(backend::Backend& backend, const Limits& limits) : backend_(backend), limits_(limits) {}
  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  backend::Backend& backend() { return backend_; }
  const Limits& limits() const { return limits_; }

  std::unique_ptr<Session> new_session();
  bool step(std::span<Session* const> sessions);  // as Engine::step

 private:
  friend class Session;  // tells when it ends

  struct Share {
    Session* session;
    uint32_t tokens;
  };
  std::vector<Share> share_budget(std::span<Session* const> sessions);
  void prepare(backend::KvSequence& kv, uint32_t tokens);
  bool drop_snapshots();
  void run(std::span<const Share> shares);

  backend::Backend& backend_;
  Limits limits_;
  std::vector<Session*> sessions_;  // all that live
  uint64_t steps_ = 0;
};

}  // namespace nibble::engine
