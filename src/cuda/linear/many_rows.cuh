#pragma once
// The kernels of many_rows.h, started: for one layout, all shapes.

#include "cuda/linear/launch_many_rows.h"
#include "cuda/linear/many_rows_mma.cuh"
#include "cuda/linear/many_rows_wgmma.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

template <class Layout, int kTokens, int kSharers>
void launch_many_rows_wgmma(cudaStream_t stream, const ManyRowsArgs& args,
                            const ManyRowsLaunch& launch) {
  constexpr uint32_t kSharedBytes = WgmmaShape<Layout, kTokens, kSharers>::kSharedBytes;
  const auto kernel = many_rows_wgmma<Layout, kTokens, kSharers>;
  NIBBLE_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(kSharedBytes)));
  launch_dependent(stream, kernel, launch.blocks, kWgmmaThreads, kSharedBytes, args, launch);
}

template <class Layout>
void launch_many_rows_kernel(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunch& launch) {
  if (launch.unit == MatrixUnit::kMma) {
    launch_dependent(stream, many_rows_mma<Layout>, launch.blocks, kMmaThreads, 0, args, launch);
    return;
  }
  if constexpr (most_sharers(sizeof(Layout)) > 1) {
    if (launch.sharers == 2)
      return launch_many_rows_wgmma<Layout, kStreamTokens, 2>(stream, args, launch);
  }
  if (launch.tile_tokens == kStreamTokens)
    return launch_many_rows_wgmma<Layout, kStreamTokens, 1>(stream, args, launch);
  launch_many_rows_wgmma<Layout, 128, 1>(stream, args, launch);
}

}  // namespace nibble::cuda
