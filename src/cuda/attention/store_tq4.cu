#include "cuda/attention/kv_tq4.cuh"
#include "cuda/attention/store.cuh"

namespace nibble::cuda {

void launch_store_tq4(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_kv_tq4(args, [&]<class Kv>() { launch_store<Kv>(stream, args); });
}

}  // namespace nibble::cuda
