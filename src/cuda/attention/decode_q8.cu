#include "cuda/attention/decode_teams.cuh"
#include "cuda/attention/kv_q8.cuh"

namespace nibble::cuda {

void launch_decode_q8(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() { launch_decode_teams<KvQ8<kDim>>(stream, args); });
}

}  // namespace nibble::cuda
