#include "cuda/runtime.h"

#include "base/error.h"

namespace nibble::cuda {

void check(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  static_cast<void>(cudaGetLastError());  // it is reported here, not by the next launch that asks
  const bool memory = error == cudaErrorMemoryAllocation;
  fail(memory ? ErrorCode::kOutOfMemory : ErrorCode::kDevice, "{}: {}", call,
       cudaGetErrorString(error));
}

DeviceShape device_shape() {
  int device, multiprocessors, shared_bytes;
  NIBBLE_CUDA(cudaGetDevice(&device));
  NIBBLE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  NIBBLE_CUDA(
      cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return {uint32_t(multiprocessors), uint32_t(shared_bytes)};
}

}  // namespace nibble::cuda
