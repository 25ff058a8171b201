#include "cuda/attention/kv_q8.cuh"
#include "cuda/attention/prefill_mma.cuh"

namespace nibble::cuda {

void launch_prefill_q8_mma(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() {
    constexpr uint32_t kTile = mma_tile(kDim, kLeastSharedBytes);
    launch_prefill_mma<DecodeRows<CodecQ8>, kDim, kTile>(stream, args);
  });
}

}  // namespace nibble::cuda
