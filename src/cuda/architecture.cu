#include <array>
#include <atomic>

#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

__global__ void any_kernel() {}

}  // namespace

uint32_t kernel_architecture() {
  static std::array<std::atomic<uint32_t>, 64> known = {};  // [device]
  int device;
  NIBBLE_CUDA(cudaGetDevice(&device));
  std::atomic<uint32_t>& architecture = known[size_t(device) % known.size()];
  if (architecture == 0) {
    cudaFuncAttributes attributes;
    const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
      static_cast<void>(cudaGetLastError());  // it is dealt with
      return 0;
    }
    check(error, "cudaFuncGetAttributes");
    architecture = uint32_t(attributes.ptxVersion);
  }
  return architecture;
}

}  // namespace nibble::cuda
