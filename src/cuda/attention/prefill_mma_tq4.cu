#include "cuda/attention/kv_tq4.cuh"
#include "cuda/attention/prefill_mma.cuh"

namespace nibble::cuda {

void launch_prefill_tq4_mma(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() {
    constexpr uint32_t kTile = mma_tile(kDim, kLeastSharedBytes);
    launch_prefill_mma<DecodeRows<CodecTq4>, kDim, kTile>(stream, args);
  });
}

}  // namespace nibble::cuda
