#include "cuda/linear/launch_many_rows.h"

namespace nibble::cuda {

void launch_many_rows(cudaStream_t stream, LayoutId layout, const ManyRowsArgs& args,
                      const ManyRowsLaunch& launch) {
  visit_layout(layout, [&](auto type) {
    launch_many_rows_kernel<typename decltype(type)::type>(stream, args, launch);
  });
}

}  // namespace nibble::cuda
