#include "cuda/attention/prefill_mma.cuh"

namespace nibble::cuda {
namespace {

// kMost: the last tile that a device of 99 KiB of shared memory makes the head_dim take.
template <int kHeadDim, int kMost>
void launch(cudaStream_t stream, const AttentionKernelArgs& args) {
  using Kv = KvF16<kHeadDim>;
  if (args.launch.mma_tile == 0) return launch_prefill_mma<Kv, 0>(stream, args);
  if constexpr (kMost >= 1) {
    if (args.launch.mma_tile == 1) return launch_prefill_mma<Kv, 1>(stream, args);
  }
  if constexpr (kMost >= 2) launch_prefill_mma<Kv, 2>(stream, args);
}

}  // namespace

void launch_prefill_f16_mma(cudaStream_t stream, const AttentionKernelArgs& args) {
  switch (args.layer.shape.head_dim) {
    case 64:
      return launch<64, 0>(stream, args);
    case 128:
      return launch<128, 0>(stream, args);
    case 256:
      return launch<256, 1>(stream, args);
    default:
      return launch<512, 2>(stream, args);
  }
}

}  // namespace nibble::cuda
