#include "base/memory.h"

#include <gtest/gtest.h>

#include <vector>

namespace nibble {
namespace {

TEST(Memory, NumbersAreOrdered) {
  EXPECT_GT(available_memory_bytes(), 0u);
  EXPECT_LE(available_memory_bytes(), total_memory_bytes());
  EXPECT_GT(peak_resident_bytes(), 0u);
  EXPECT_LE(peak_resident_bytes(), total_memory_bytes());
}

TEST(Memory, PeakSeesWhatWasTouched) {
  constexpr size_t kTaken = 64 << 20;
  std::vector<char> taken(kTaken);
  // Volatile: clang leaves out memory that nobody reads.
  volatile char* const bytes = taken.data();
  for (size_t i = 0; i < kTaken; i += 1024) bytes[i] = 1;
  EXPECT_GE(peak_resident_bytes(), kTaken);
}

}  // namespace
}  // namespace nibble
