#pragma once
// What this room's tests share.

#include <gtest/gtest.h>

#include "cuda/linear/many_rows.h"
#include "cuda/runtime.h"

namespace nibble::cuda::test {

inline bool has_gpu() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// Says so and leaves the test where there is no GPU.
#define NIBBLE_NEEDS_GPU() \
  if (!::nibble::cuda::test::has_gpu()) GTEST_SKIP() << "this machine has no CUDA device"

inline DeviceShape device_shape() {
  int multiprocessors, shared_bytes;
  NIBBLE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  NIBBLE_CUDA(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  return {uint32_t(multiprocessors), uint32_t(shared_bytes)};
}

inline MatrixUnit matrix_unit() {
  int major;
  NIBBLE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return cuda::matrix_unit(uint32_t(major));
}

}  // namespace nibble::cuda::test
