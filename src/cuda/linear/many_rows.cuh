#pragma once
// The kernels of many_rows.h, started: for one layout, all shapes.

#include "cuda/linear/launch_many_rows.h"
#include "cuda/linear/many_rows_mma.cuh"
#include "cuda/linear/many_rows_wgmma.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

template <class Layout, int kTokens>
void launch_many_rows_wgmma(cudaStream_t stream, const ManyRowsArgs& args,
                            const ManyRowsLaunch& launch) {
  constexpr uint32_t kSharedBytes = WgmmaShape<Layout, kTokens>::kSharedBytes;
  const auto kernel = many_rows_wgmma<Layout, kTokens>;
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
  switch (launch.tile_tokens) {
    case 16:
      return launch_many_rows_wgmma<Layout, 16>(stream, args, launch);
    case 32:
      return launch_many_rows_wgmma<Layout, 32>(stream, args, launch);
    case 64:
      return launch_many_rows_wgmma<Layout, 64>(stream, args, launch);
    default:
      return launch_many_rows_wgmma<Layout, 128>(stream, args, launch);
  }
}

}  // namespace nibble::cuda
