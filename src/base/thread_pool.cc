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

// Spins until `ready()` or for kSpinTime; says which.
template <class Ready>
bool spin_until(const Ready& ready) {
  constexpr int kPausesPerClockRead = 16;
  const auto deadline = std::chrono::steady_clock::now() + kSpinTime;
  do {
    for (int i = 0; i < kPausesPerClockRead; ++i) {
      if (ready()) return true;
      pause_core();
    }
  } while (std::chrono::steady_clock::now() < deadline);
  return false;
}

}  // namespace

// A region is a gate that workers go through while it is open. The caller closes it when no work is
// left and waits only for those inside: a worker that the system has not let run yet, on a machine
// busy with other things, holds nobody up.
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
    open(nullptr);
    for (std::thread& worker : workers) worker.join();
    workers.clear();
  }

  void open(const Body* next) {
    body = next;
    finished.store(0, std::memory_order_relaxed);
    const uint64_t region = gate.load(std::memory_order_relaxed) / kRegion + 1;
    gate.store(region * kRegion + kOpen, std::memory_order_release);
    gate.notify_all();
  }

  void close() {
    gate.fetch_and(~kOpen, std::memory_order_acq_rel);
    wait_until([this] { return gate.load(std::memory_order_acquire) % kOpen == 0; });
  }

  // By the caller, for something that workers bring about before they leave.
  template <class Ready>
  void wait_until(const Ready& ready) {
    if (spin_until(ready)) return;
    for (;;) {
      const uint32_t seen = departures.load(std::memory_order_acquire);
      if (ready()) return;
      departures.wait(seen, std::memory_order_acquire);
    }
  }

  void work(uint32_t thread) noexcept {
    for (uint64_t last_region = 0;;) {
      uint64_t now;
      const auto news = [&] {
        now = gate.load(std::memory_order_acquire);
        return now / kRegion != last_region;
      };
      if (!spin_until(news)) {
        while (!news()) gate.wait(now, std::memory_order_acquire);
      }
      while (now & kOpen) {
        if (!gate.compare_exchange_weak(now, now + 1, std::memory_order_acq_rel,
                                        std::memory_order_acquire)) {
          continue;
        }
        if (body == nullptr) return;
        (*body)(thread);
        finished.fetch_add(1, std::memory_order_release);
        gate.fetch_sub(1, std::memory_order_acq_rel);
        departures.fetch_add(1, std::memory_order_release);
        departures.notify_one();
        break;
      }
      last_region = now / kRegion;
    }
  }

  // Threads come as they get free; those that are late find it closed.
  void run_with_who_comes(const Body& next) noexcept {
    open(&next);
    next(0);
    close();
  }

  void run_with_all(const Body& next) noexcept {
    open(&next);
    next(0);
    wait_until([this] { return finished.load(std::memory_order_acquire) == workers.size(); });
    close();
  }

  // The gate's word: the region's number, whether it is open, how many workers are inside.
  static constexpr uint64_t kOpen = uint64_t{1} << 31;
  static constexpr uint64_t kRegion = uint64_t{1} << 32;
  alignas(64) std::atomic<uint64_t> gate{0};
  const Body* body = nullptr;  // nullptr sends the workers home
  alignas(64) std::atomic<uint32_t> finished{0};
  std::atomic<uint32_t> departures{0};
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
  team_->run_with_all(body);
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
    team_->run_with_who_comes(take_chunks);
  }
}

}  // namespace nibble
