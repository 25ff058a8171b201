#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

namespace nibble {

// A fixed team of threads that runs one parallel region at a time. Between regions that follow
// closely the team waits by spinning for some microseconds, then sleeps: an idle engine uses no
// core. One caller at a time; not re-entrant.
class ThreadPool {
 public:
  // `threads` counts the caller, who works too; 0 means one per core that the process may use.
  explicit ThreadPool(uint32_t threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  uint32_t size() const;

  // Runs body(thread) once on each thread, thread in [0, size()), and returns when all are done.
  // The body must not throw.
  void run(const std::function<void(uint32_t thread)>& body);

  // Splits [0, items) into chunks of `grain` that threads take as they get free, and calls
  // body(begin, end, thread) for each. Use `grain` to keep a chunk worth its hand-over (~1 us).
  // Returns when all chunks are done, also when some threads never got to run.
  void for_each_chunk(size_t items, size_t grain,
                      const std::function<void(size_t begin, size_t end, uint32_t thread)>& body);

 private:
  struct Team;
  std::unique_ptr<Team> team_;
};

}  // namespace nibble
