#include "cuda/attention/kv_f16.cuh"
#include "cuda/attention/store.cuh"

namespace nibble::cuda {

void launch_store_f16(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() { launch_store<KvF16<kDim>>(stream, args); });
}

}  // namespace nibble::cuda
