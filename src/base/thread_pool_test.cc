#include "base/thread_pool.h"

#include <gtest/gtest.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif

#include "base/error.h"

namespace nibble {
namespace {

double process_cpu_ms() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return double(time.tv_sec) * 1e3 + double(time.tv_nsec) * 1e-6;
}

TEST(ThreadPool, RunsEachThreadOnce) {
  for (uint32_t threads : {1u, 2u, 3u, 8u}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    for (int region = 0; region < 200; ++region) {
      std::vector<int> calls(threads, 0);  // plain ints: each thread has its own
      pool.run([&](uint32_t thread) { ++calls[thread]; });
      EXPECT_EQ(calls, std::vector<int>(threads, 1));
    }
  }
}

TEST(ThreadPool, RegionsSeeWhatEarlierRegionsWrote) {
  ThreadPool pool(4);
  std::vector<uint64_t> values(4, 1);
  for (int region = 0; region < 1000; ++region) {
    std::vector<uint64_t> next(4);
    pool.run([&](uint32_t thread) { next[thread] = values[(thread + 1) % 4] + thread; });
    values = next;
  }
  uint64_t sum = 0;
  for (uint64_t value : values) sum += value;
  EXPECT_EQ(sum, 4u + 1000 * (0 + 1 + 2 + 3));
}

TEST(ThreadPool, ChunksCoverTheRangeOnce) {
  ThreadPool pool(3);
  for (size_t items : {0, 1, 2, 7, 64, 1000}) {
    for (size_t grain : {1, 3, 64, 5000}) {
      std::vector<std::atomic<int>> touched(items);
      pool.for_each_chunk(items, grain, [&](size_t begin, size_t end, uint32_t thread) {
        EXPECT_LT(begin, end);
        EXPECT_LE(end - begin, grain);
        EXPECT_LT(thread, pool.size());
        for (size_t i = begin; i < end; ++i) ++touched[i];
      });
      for (size_t i = 0; i < items; ++i) EXPECT_EQ(touched[i], 1) << i << " of " << items;
    }
  }
}

TEST(ThreadPool, WakesAfterSleeping) {
  ThreadPool pool(4);
  for (int round = 0; round < 5; ++round) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // well past the spinning
    std::atomic<int> calls{0};
    pool.run([&](uint32_t) { ++calls; });
    EXPECT_EQ(calls, 4);
  }
}

TEST(ThreadPool, CallerSleepsWhileOthersWork) {
  ThreadPool pool(2);
  const double before = process_cpu_ms();
  pool.run([](uint32_t thread) {
    if (thread == 1) std::this_thread::sleep_for(std::chrono::milliseconds(100));
  });
  EXPECT_LT(process_cpu_ms() - before, 20);
}

TEST(ThreadPool, IdleUsesNoCore) {
  ThreadPool pool(4);
  pool.run([](uint32_t) {});
  const double before = process_cpu_ms();
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_LT(process_cpu_ms() - before, 10);  // 4 spinning threads would use 600 ms and more
}

TEST(ThreadPool, DefaultsToUsableCores) {
#ifdef __linux__
  cpu_set_t all;
  ASSERT_EQ(sched_getaffinity(0, sizeof(all), &all), 0);
  EXPECT_EQ(ThreadPool().size(), uint32_t(CPU_COUNT(&all)));
  std::thread([&] {  // affinity belongs to a thread: the test's own stays as it is
    int core = 0;
    while (!CPU_ISSET(core, &all)) ++core;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(core, &one);
    ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
    EXPECT_EQ(ThreadPool().size(), 1u);
  })
      .join();
#endif
  EXPECT_GE(ThreadPool().size(), 1u);
}

TEST(ThreadPool, RefusesAbsurdSizes) {
  try {
    ThreadPool pool(4'000'000'000u);
    FAIL() << "was accepted";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    EXPECT_NE(std::string(error.what()).find("4000000000"), std::string::npos);
  }
}

}  // namespace
}  // namespace nibble
