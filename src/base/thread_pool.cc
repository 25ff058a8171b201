#include "base/thread_pool.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble {
namespace {

constexpr uint32_t kMaxThreads = 1024;

// Covers the serial work between the regions of one token, and no more: a futex wake costs some
// 50 us of latency, a spinning core costs the rest of the machine.
constexpr std::chrono::microseconds kSpinTime{50};

uint32_t usable_cores() {
#ifdef __linux__
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) == 0) return uint32_t(CPU_COUNT(&cores));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Returns the first value of `state` that is not `old`: spins for kSpinTime, then sleeps.
uint32_t wait_for_change(const std::atomic<uint32_t>& state, uint32_t old) {
  constexpr int kPausesPerClockRead = 16;
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      const uint32_t now = state.load(std::memory_order_acquire);
      if (now != old) return now;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  state.wait(old, std::memory_order_acquire);
  return state.load(std::memory_order_acquire);
}

}  // namespace

struct ThreadPool::Team {
  using Body = std::function<void(uint32_t)>;

  explicit Team(uint32_t size) {
    workers.reserve(size - 1);
    try {
      for (uint32_t thread = 1; thread < size; ++thread) {
        workers.emplace_back([this, thread] { work(thread); });
      }
    } catch (const std::system_error& error) {
      const size_t started = workers.size() + 1;
      stop();
      fail(ErrorCode::kOutOfMemory, "only {} of {} threads could be started: {}", started, size,
           error.what());
    }
  }
  ~Team() { stop(); }

  void stop() {
    start_region(nullptr);
    for (std::thread& worker : workers) worker.join();
    workers.clear();
  }

  void start_region(const Body* next) {
    body = next;
    busy_workers.store(uint32_t(workers.size()), std::memory_order_relaxed);
    region.fetch_add(1, std::memory_order_release);
    region.notify_all();
  }

  void work(uint32_t thread) noexcept {
    for (uint32_t seen = 0;;) {
      seen = wait_for_change(region, seen);
      if (body == nullptr) return;
      (*body)(thread);
      if (busy_workers.fetch_sub(1, std::memory_order_acq_rel) == 1) busy_workers.notify_one();
    }
  }

  void run(const Body& next) noexcept {
    start_region(&next);
    next(0);
    uint32_t busy = busy_workers.load(std::memory_order_acquire);
    while (busy != 0) busy = wait_for_change(busy_workers, busy);
  }

  const Body* body = nullptr;  // of the current region; nullptr sends the workers home
  // On cache lines of their own: all workers read the one while they write the other.
  alignas(64) std::atomic<uint32_t> region{0};
  alignas(64) std::atomic<uint32_t> busy_workers{0};
  std::vector<std::thread> workers;
};

ThreadPool::ThreadPool(uint32_t threads) {
  if (threads == 0) threads = std::min(usable_cores(), kMaxThreads);
  if (threads > kMaxThreads) {
    fail(ErrorCode::kInvalidArgument, "{} threads asked for, at most {} are possible", threads,
         kMaxThreads);
  }
  team_ = std::make_unique<Team>(threads);
}

ThreadPool::~ThreadPool() = default;

uint32_t ThreadPool::size() const {
  return uint32_t(team_->workers.size()) + 1;
}

void ThreadPool::run(const std::function<void(uint32_t)>& body) {
  team_->run(body);
}

void ThreadPool::for_each_chunk(size_t items, size_t grain,
                                const std::function<void(size_t, size_t, uint32_t)>& body) {
  NIBBLE_CHECK(grain > 0);
  const size_t chunks = ceil_div(items, grain);
  std::atomic<size_t> next_chunk{0};
  const auto take_chunks = [&](uint32_t thread) {
    for (;;) {
      const size_t chunk = next_chunk.fetch_add(1, std::memory_order_relaxed);
      if (chunk >= chunks) return;
      body(chunk * grain, std::min(items, (chunk + 1) * grain), thread);
    }
  };
  if (chunks <= 1) {
    take_chunks(0);  // not worth waking anybody
  } else {
    team_->run(take_chunks);
  }
}

}  // namespace nibble
