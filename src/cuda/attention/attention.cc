#include "cuda/attention/attention.h"

#include "base/error.h"
#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {

void launch_attention(cudaStream_t stream, const AttentionLayer& layer,
                      const AttentionLaunch& launch, const AttentionArgs& step) {
  const backend::AttentionShape& shape = layer.shape;
  const uint32_t head_dim = shape.head_dim;
  if (head_dim != 64 && head_dim != 128 && head_dim != 256 && head_dim != 512)
    fail(ErrorCode::kUnsupported,
         "attention with head_dim {}: CUDA has kernels for 64, 128, 256 and 512; use --backend cpu",
         head_dim);
  if (shape.query_heads / shape.kv_heads > kQueryTile)
    fail(ErrorCode::kUnsupported,
         "attention with {} query heads for {} KV heads: CUDA takes up to {} for each; use "
         "--backend cpu",
         shape.query_heads, shape.kv_heads, kQueryTile);
  if (layer.format != backend::KvFormat::kF16)
    fail(ErrorCode::kUnsupported, "KV format {}: CUDA has f16; use --kv f16",
         backend::to_string(layer.format));

  const AttentionKernelArgs args = {layer, launch, step, static_cast<__half*>(step.workspace)};
  if (launch.single_rows > 0) launch_decode_f16(stream, args);
  if (launch.rows > launch.single_rows) {
    launch_store_f16(stream, args);
    const bool wgmma = launch.unit == MatrixUnit::kWgmma;
    (wgmma ? launch_prefill_f16_wgmma : launch_prefill_f16_mma)(stream, args);
  }
}

}  // namespace nibble::cuda
