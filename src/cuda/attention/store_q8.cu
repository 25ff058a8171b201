#include "cuda/attention/kv_q8.cuh"
#include "cuda/attention/store.cuh"

namespace nibble::cuda {

void launch_store_q8(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() { launch_store<KvQ8<kDim>>(stream, args); });
}

}  // namespace nibble::cuda
