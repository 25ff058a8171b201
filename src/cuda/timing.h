#pragma once
// Time that work takes on the device.

#include <cuda_runtime_api.h>

#include <algorithm>

#include "cuda/handles.h"

namespace nibble::cuda {

// Milliseconds that what start() starts in `stream` takes.
template <class Start>
float time_ms(cudaStream_t stream, const Start& start) {
  const Event begin, end;
  NIBBLE_CUDA(cudaEventRecord(begin.handle, stream));
  start();
  NIBBLE_CUDA(cudaGetLastError());
  NIBBLE_CUDA(cudaEventRecord(end.handle, stream));
  NIBBLE_CUDA(cudaEventSynchronize(end.handle));
  float ms;
  NIBBLE_CUDA(cudaEventElapsedTime(&ms, begin.handle, end.handle));
  return ms;
}

// The shortest of eight times.
template <class Start>
float best_ms(cudaStream_t stream, const Start& start) {
  float best = time_ms(stream, start);
  for (int pass = 1; pass < 8; ++pass) best = std::min(best, time_ms(stream, start));
  return best;
}

}  // namespace nibble::cuda
