#pragma once
// The CUDA runtime as the rest of this room uses it: errors as exceptions, kernels in a stream.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/device_shape.h"

namespace nibble::cuda {

// Throws Error(kDevice), or Error(kOutOfMemory), that names the failed call.
void check(cudaError_t error, const char* call);
#define NIBBLE_CUDA(call) ::nibble::cuda::check((call), #call)

// For which architecture this build's kernels were compiled that the current device runs: 80, 90
// (which stands for 90a), 120, ...; 0 where there are none for it. What a kernel can do depends on
// this, not on the device.
uint32_t kernel_architecture();

// The current device's.
DeviceShape device_shape();
inline MatrixUnit device_matrix_unit() {
  return matrix_unit_of(kernel_architecture());
}

// Clusters of blocks and starting early are both of compute capability 9.0 and above.
inline bool has_clusters() {
  return kernel_architecture() >= 90;
}

// Starts a kernel that may begin before the one in front of it ends, where there is such a thing:
// it must wait_for_dependencies() before it reads or writes what others touch. In `clusters`
// clusters of `blocks` blocks each; without clusters `blocks` must be 1.
template <class... Parameters, class... Arguments>
void launch_dependent_clusters(cudaStream_t stream, void (*kernel)(Parameters...), dim3 clusters,
                               uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
                               const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {blocks, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = {clusters.x * blocks, clusters.y, clusters.z};
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = blocks > 1 ? 2 : has_clusters();
  NIBBLE_CUDA(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...));
}

// The same in blocks by themselves.
template <class... Parameters, class... Arguments>
void launch_dependent(cudaStream_t stream, void (*kernel)(Parameters...), dim3 blocks,
                      uint32_t threads, uint32_t shared_bytes, const Arguments&... arguments) {
  launch_dependent_clusters(stream, kernel, blocks, 1, threads, shared_bytes, arguments...);
}

}  // namespace nibble::cuda
