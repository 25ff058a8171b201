#pragma once
// What this room's tests share.

#include <gtest/gtest.h>

#include "cuda/runtime.h"

namespace nibble::cuda::test {

inline bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// Says so and leaves the test where there is no GPU.
#define NIBBLE_NEEDS_GPU() \
  if (!::nibble::cuda::test::has_gpu()) GTEST_SKIP() << "this machine has no CUDA device"

}  // namespace nibble::cuda::test
