#pragma once
// Starts the kernels of few_rows.h.

#include <cuda_runtime_api.h>

#include "cuda/linear/few_rows.h"

namespace nibble::cuda {

// The weight's layouts are those that `launch` was chosen for. The output parts are complete when
// the kernel has run; nothing needs to be cleared before.
void launch_few_rows(cudaStream_t stream, LayoutId first, std::optional<LayoutId> second,
                     const FewRowsArgs& args, const FewRowsLaunch& launch);

struct NoLayout {};

// The same for one kernel; instances lie in few_rows_*.cu.
template <class First, class Second>
void launch_few_rows_kernel(cudaStream_t stream, const FewRowsArgs& args,
                            const FewRowsLaunch& launch);

}  // namespace nibble::cuda
