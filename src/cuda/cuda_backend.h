#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"
#include "base/progress.h"

namespace nibble::cuda {

// GPUs that this process can use; 0 also where there is no driver.
uint32_t device_count();

struct DeviceInfo {
  std::string name;
  uint32_t multiprocessors;
  uint32_t major, minor;  // compute capability
  uint64_t memory_bytes;
  uint64_t free_bytes;
};
DeviceInfo device_info(uint32_t device);

// Runs plans on one GPU. Weights are copied to device memory, so the plan's mapping may go away
// afterwards; the plan itself must outlive the backend. Throws Error(kOutOfMemory) when the device
// has too little memory for weights and workspace (engine::fit() says so before), and
// Error(kUnsupported) for what it has no kernels for: a device, KV format f32, or heads that
// check_heads() refuses.
std::unique_ptr<backend::Backend> make_cuda_backend(const backend::Plan& plan,
                                                    const backend::BackendOptions& options,
                                                    const Progress& progress);

// Bytes of the device that are left for what engine::memory_needs() counts: stored weights may be
// larger than the file's.
uint64_t free_bytes_for(const backend::Plan& plan, backend::WeightStorage storage, uint32_t device);

}  // namespace nibble::cuda
