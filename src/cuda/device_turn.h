#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <mutex>
#include <vector>

#include "cuda/cuda_backend.h"

namespace nibble::cuda {

// Backends on one device step in turn. Blocks of attention and of matrices wait for each other, so
// all of a kernel's must find room at once: beside another backend's kernels they might not.
class DeviceTurn {
 public:
  DeviceTurn(uint32_t device, cudaStream_t stream) : lock_(mutex_of(device)), stream_(stream) {}
  ~DeviceTurn() { cudaStreamSynchronize(stream_); }  // also of a step that failed
  DeviceTurn(const DeviceTurn&) = delete;
  DeviceTurn& operator=(const DeviceTurn&) = delete;

 private:
  static std::mutex& mutex_of(uint32_t device) {
    static std::vector<std::mutex> mutexes(device_count());
    return mutexes[device];
  }
  std::lock_guard<std::mutex> lock_;
  cudaStream_t stream_;
};

}  // namespace nibble::cuda
