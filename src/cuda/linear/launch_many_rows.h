#pragma once
// Starts the kernels of many_rows.h.

#include <cuda_runtime_api.h>

#include "cuda/linear/many_rows.h"

namespace nibble::cuda {

// The weight's layout is the one that `launch` was chosen for.
void launch_many_rows(cudaStream_t stream, LayoutId layout, const ManyRowsArgs& args,
                      const ManyRowsLaunch& launch);

// The kernel of one layout; instances lie in many_rows_*.cu.
template <class Layout>
void launch_many_rows_kernel(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunch& launch);

}  // namespace nibble::cuda
