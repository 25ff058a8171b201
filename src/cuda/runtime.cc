#include "cuda/runtime.h"

#include "base/error.h"

namespace nibble::cuda {

void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) fail(ErrorCode::kDevice, "{}: {}", call, cudaGetErrorString(error));
}

}  // namespace nibble::cuda
