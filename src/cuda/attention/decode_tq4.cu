#include "cuda/attention/decode_teams.cuh"
#include "cuda/attention/kv_tq4.cuh"

namespace nibble::cuda {

void launch_decode_tq4(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_kv_tq4(args, [&]<class Kv>() { launch_decode_teams<Kv>(stream, args); });
}

}  // namespace nibble::cuda
