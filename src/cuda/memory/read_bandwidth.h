#pragma once

#include <cuda_runtime_api.h>

namespace nibble::cuda {

// Bytes per second that a kernel with nothing else to do reads from device memory: the best of
// several passes over a buffer much larger than the caches, or over what memory is left.
double measure_read_bandwidth(cudaStream_t stream);

}  // namespace nibble::cuda
