#include "cuda/linear/launch_few_rows.h"

#include "base/error.h"

namespace nibble::cuda {

void launch_few_rows(cudaStream_t stream, LayoutId first, std::optional<LayoutId> second,
                     const FewRowsArgs& args, const FewRowsLaunch& launch) {
  NIBBLE_CHECK(has_few_rows_kernel(first, second));
  if (second && first == LayoutId::kQ4)
    return launch_few_rows_kernel<CudaQ4Tiled, CudaQ6Tiled>(stream, args, launch);
  if (second) return launch_few_rows_kernel<CudaQ5Tiled, CudaQ6Tiled>(stream, args, launch);
  visit_layout(first, [&](auto layout) {
    using Layout = typename decltype(layout)::type;
    launch_few_rows_kernel<Layout, NoLayout>(stream, args, launch);
  });
}

}  // namespace nibble::cuda
