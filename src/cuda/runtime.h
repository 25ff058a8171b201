#pragma once
// The CUDA runtime as the rest of this room uses it: errors as exceptions, kernels in a stream.

#include <cuda_runtime.h>

#include <cstdint>

namespace nibble::cuda {

// Throws Error(kDevice) that names the failed call.
void check(cudaError_t error, const char* call);
#define NIBBLE_CUDA(call) ::nibble::cuda::check((call), #call)

// Starts a kernel that may begin before the one in front of it ends: it must
// wait_for_dependencies() before it reads or writes what others touch.
template <class... Parameters, class... Arguments>
void launch_dependent(cudaStream_t stream, void (*kernel)(Parameters...), uint32_t blocks,
                      uint32_t threads, uint32_t shared_bytes, const Arguments&... arguments) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  NIBBLE_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

}  // namespace nibble::cuda
