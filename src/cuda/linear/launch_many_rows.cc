#include "cuda/linear/launch_many_rows.h"

#include "base/error.h"

namespace nibble::cuda {

void launch_many_rows(cudaStream_t stream, LayoutId layout, const ManyRowsArgs& args,
                      const ManyRowsLaunch& launch) {
  visit_layout(layout, [&](auto type) {
    launch_many_rows_kernel<typename decltype(type)::type>(stream, args, launch);
  });
}

void launch_many_rows(cudaStream_t stream, LayoutId first, LayoutId second,
                      const ManyRowsArgs& args, const ManyRowsLaunches& launches) {
  NIBBLE_CHECK(second == LayoutId::kQ6 && (first == LayoutId::kQ4 || first == LayoutId::kQ5));
  if (first == LayoutId::kQ4)
    return launch_many_rows_kernel<CudaQ4Tiled, CudaQ6Tiled>(stream, args, launches);
  launch_many_rows_kernel<CudaQ5Tiled, CudaQ6Tiled>(stream, args, launches);
}

}  // namespace nibble::cuda
