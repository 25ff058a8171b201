#pragma once
// Starts the kernels of many_rows.h.

#include <cuda_runtime_api.h>

#include "cuda/linear/launch_few_rows.h"
#include "cuda/linear/many_rows.h"

namespace nibble::cuda {

// The weight's layout is the one that `launch` was chosen for.
void launch_many_rows(cudaStream_t stream, LayoutId layout, const ManyRowsArgs& args,
                      const ManyRowsLaunch& launch);

// Two layouts in one launch, if has_many_rows_kernel().
void launch_many_rows(cudaStream_t stream, LayoutId first, LayoutId second,
                      const ManyRowsArgs& args, const ManyRowsLaunches& launches);

// The kernel of one layout, or of two; instances lie in many_rows_*.cu.
template <class Layout>
void launch_many_rows_kernel(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunch& launch);
template <class First, class Second>
void launch_many_rows_kernel(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunches& launches);

}  // namespace nibble::cuda
