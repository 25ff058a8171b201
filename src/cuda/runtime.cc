#include "cuda/runtime.h"

#include "base/error.h"

namespace nibble::cuda {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) fail(ErrorCode::kDevice, "{}: {}", call, cudaGetErrorString(error));
}

bool has_clusters(const void* kernel) {
  cudaFuncAttributes attributes;
  NIBBLE_CUDA(cudaFuncGetAttributes(&attributes, kernel));
  return attributes.ptxVersion >= 90;
}

}  // namespace nibble::cuda
