#include "cuda/runtime.h"

#include <gtest/gtest.h>

#include <cstddef>

#include "base/error.h"
#include "cuda/device_array.h"
#include "cuda/test_support.h"

namespace nibble::cuda {
namespace {

TEST(Runtime, AnErrorIsReportedOnce) {
  NIBBLE_NEEDS_GPU();
  try {
    const DeviceArray<std::byte> too_large(size_t{1} << 50);
    FAIL() << "a petabyte";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
  }
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
}

}  // namespace
}  // namespace nibble::cuda
