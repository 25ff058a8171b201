#include "cuda/attention/prefill_mma.cuh"

namespace nibble::cuda {

void launch_prefill_f16_mma(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() {
    constexpr uint32_t kMost = mma_tile(kDim, kLeastSharedBytes);
    const uint32_t tile = args.launch.mma_tile;
    if (tile == 0) return launch_prefill_mma<CopyRows, kDim, 0>(stream, args);
    if constexpr (kMost >= 1) {
      if (tile == 1) return launch_prefill_mma<CopyRows, kDim, 1>(stream, args);
    }
    if constexpr (kMost >= 2) launch_prefill_mma<CopyRows, kDim, 2>(stream, args);
  });
}

}  // namespace nibble::cuda
