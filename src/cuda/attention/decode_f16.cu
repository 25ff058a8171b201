#include "cuda/attention/decode_teams.cuh"
#include "cuda/attention/decode_warps.cuh"

namespace nibble::cuda {

void launch_decode_f16(cudaStream_t stream, const AttentionKernelArgs& args) {
  with_head_dim(args, [&]<int kDim>() {
    if (args.launch.decode.warps > 0) return launch_decode_teams<KvF16<kDim>>(stream, args);
    if constexpr (kDim == kSharingHeadDim) {
      if (args.launch.sharers == 2)
        return launch_decode_warps<SharedBy<F16Rows<kDim>, 2>>(stream, args);
    }
    launch_decode_warps<SharedBy<F16Rows<kDim>, 1>>(stream, args);
  });
}

}  // namespace nibble::cuda
