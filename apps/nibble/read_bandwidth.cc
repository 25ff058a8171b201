#include "nibble/read_bandwidth.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <memory>
#include <numeric>
#include <vector>

#include "base/memory.h"
#include "base/thread_pool.h"

namespace nibble::app {
namespace {

// Independent sums, so that the loop waits for memory and for nothing else.
uint64_t sum(const uint64_t* words, size_t count) {
  std::array<uint64_t, 32> sums{};
  for (size_t i = 0; i + sums.size() <= count; i += sums.size()) {
    for (size_t lane = 0; lane < sums.size(); ++lane) sums[lane] += words[i + lane];
  }
  return std::accumulate(sums.begin(), sums.end(), uint64_t{0});
}

}  // namespace

double measure_read_bandwidth(uint32_t threads) {
  constexpr uint64_t kMaxBytes = 512'000'000;
  constexpr int kPasses = 8;
  ThreadPool pool(threads);
  const size_t words = std::min(kMaxBytes, available_memory_bytes() / 4) / sizeof(uint64_t);
  const size_t share = words / pool.size();  // of one thread
  const std::unique_ptr<uint64_t[]> buffer(new uint64_t[words]);
  // Each thread writes first what it will read: then the pages lie near it.
  pool.run([&](uint32_t thread) {
    std::iota(&buffer[thread * share], &buffer[thread * share] + share, uint64_t{thread});
  });

  std::vector<uint64_t> sums(pool.size());
  double best_seconds = 1e9;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = std::chrono::steady_clock::now();
    pool.run([&](uint32_t thread) { sums[thread] = sum(&buffer[thread * share], share); });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best_seconds = std::min(best_seconds, seconds.count());
  }
  // Somebody has to look at the sums, or the compiler need not read at all.
  volatile uint64_t total = std::accumulate(sums.begin(), sums.end(), uint64_t{0});
  (void)total;
  return double(share * pool.size() * sizeof(uint64_t)) / best_seconds;
}

}  // namespace nibble::app
