#pragma once

#include <cuda_runtime_api.h>

namespace nibble::cuda {

// Multiplications and additions per second of products of f16 matrices with f32 sums (bf16's are as
// fast) when the tensor cores have nothing to wait for: operands are random numbers that lie in
// registers and shared memory. The best of several passes.
double measure_matrix_rate(cudaStream_t stream);

}  // namespace nibble::cuda
