#include "cuda/attention/prefill.cuh"

namespace nibble::cuda {

void launch_prefill_f16(cudaStream_t stream, const AttentionKernelArgs& args) {
  switch (args.layer.shape.head_dim) {
    case 64:
      return launch_prefill<KvF16<64>>(stream, args);
    case 128:
      return launch_prefill<KvF16<128>>(stream, args);
    case 256:
      return launch_prefill<KvF16<256>>(stream, args);
    default:
      return launch_prefill<KvF16<512>>(stream, args);
  }
}

}  // namespace nibble::cuda
