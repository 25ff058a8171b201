#include "cuda/attention/store.cuh"

namespace nibble::cuda {

void launch_store_f16(cudaStream_t stream, const AttentionKernelArgs& args) {
  switch (args.layer.shape.head_dim) {
    case 64:
      return launch_store<KvF16<64>>(stream, args);
    case 128:
      return launch_store<KvF16<128>>(stream, args);
    case 256:
      return launch_store<KvF16<256>>(stream, args);
    default:
      return launch_store<KvF16<512>>(stream, args);
  }
}

}  // namespace nibble::cuda
