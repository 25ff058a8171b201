#include "cuda/attention/prefill_wgmma.cuh"

namespace nibble::cuda {

void launch_prefill_f16_wgmma(cudaStream_t stream, const AttentionKernelArgs& args) {
  switch (args.layer.shape.head_dim) {
    case 64:
      return launch_prefill_wgmma<KvF16Tiles<64>>(stream, args);
    case 128:
      return launch_prefill_wgmma<KvF16Tiles<128>>(stream, args);
    case 256:
      return launch_prefill_wgmma<KvF16Tiles<256>>(stream, args);
    default:
      return launch_prefill_wgmma<KvF16Tiles<512>>(stream, args);
  }
}

}  // namespace nibble::cuda
