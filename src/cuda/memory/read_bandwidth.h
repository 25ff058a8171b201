#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <span>

namespace nibble::cuda {

// Bytes per second that a kernel with nothing else to do reads from device memory: the best of
// several passes over 2 GiB of `memory`, which lies there, or, where that is less, over a buffer of
// 2 GiB or half of what is free.
double measure_read_bandwidth(cudaStream_t stream, std::span<const std::byte> memory);

}  // namespace nibble::cuda
