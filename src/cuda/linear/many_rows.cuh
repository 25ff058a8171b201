#pragma once
// The kernels of many_rows.h, started: for one layout, all shapes.

#include <algorithm>

#include "cuda/linear/launch_many_rows.h"
#include "cuda/linear/many_rows_mma.cuh"
#include "cuda/linear/many_rows_wgmma.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {

template <class First, class Second, int kTokens>
void launch_many_rows_wgmma(cudaStream_t stream, const ManyRowsArgs& args,
                            const ManyRowsLaunches& launches) {
  using Shape = WgmmaShape<First, kTokens>;
  uint32_t shared_bytes = Shape::kSharedBytes;
  if constexpr (!std::is_same_v<Second, NoLayout>)
    shared_bytes = std::max(shared_bytes, WgmmaShape<Second, kTokens>::kSharedBytes);
  const auto kernel = many_rows_wgmma<First, Second, kTokens>;
  NIBBLE_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  launch_dependent(stream, kernel, launches.first.blocks + launches.second.blocks, Shape::kThreads,
                   shared_bytes, args, launches);
}

// Of up to kStreamTokens rows.
template <class First, class Second>
void launch_many_rows_stream(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunches& launches) {
  if (launches.first.tile_tokens < kStreamTokens)
    return launch_many_rows_wgmma<First, Second, kStreamTokens / 2>(stream, args, launches);
  launch_many_rows_wgmma<First, Second, kStreamTokens>(stream, args, launches);
}

template <class Layout>
void launch_many_rows_kernel(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunch& launch) {
  if (launch.unit == MatrixUnit::kMma) {
    launch_dependent(stream, many_rows_mma<Layout>, launch.blocks, kMmaThreads, 0, args, launch);
  } else if (launch.tile_tokens <= kStreamTokens) {
    launch_many_rows_stream<Layout, NoLayout>(stream, args, {launch, {}});
  } else {
    launch_many_rows_wgmma<Layout, NoLayout, 128>(stream, args, {launch, {}});
  }
}

template <class First, class Second>
void launch_many_rows_kernel(cudaStream_t stream, const ManyRowsArgs& args,
                             const ManyRowsLaunches& launches) {
  launch_many_rows_stream<First, Second>(stream, args, launches);
}

}  // namespace nibble::cuda
