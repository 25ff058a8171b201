#include "cuda/attention/attention.h"

#include "base/error.h"
#include "cuda/attention/kernel_args.h"

namespace nibble::cuda {
namespace {

using Launch = void (*)(cudaStream_t, const AttentionKernelArgs&);
struct FormatKernels {
  Launch decode, store, prefill_mma;
};

FormatKernels kernels_of(backend::KvFormat format) {
  using backend::KvFormat;
  switch (format) {
    case KvFormat::kF16:
      return {launch_decode_f16, launch_store_f16, launch_prefill_f16_mma};
    case KvFormat::kQ8:
      return {launch_decode_q8, launch_store_q8, launch_prefill_q8_mma};
    case KvFormat::kTq4:
      return {launch_decode_tq4, launch_store_tq4, launch_prefill_tq4_mma};
    case KvFormat::kF32:
      break;
  }
  fail(ErrorCode::kUnsupported, "KV format {}: CUDA has f16, q8 and tq4",
       backend::to_string(format));
}

void launch_prefill(cudaStream_t stream, const AttentionKernelArgs& args,
                    const FormatKernels& kernels) {
  const AttentionLayer& layer = args.layer;
  const AttentionArgs& step = args.step;
  if (args.launch.unit != MatrixUnit::kWgmma) return kernels.prefill_mma(stream, args);
  if (layer.kv.block == 0) return launch_prefill_f16_wgmma(stream, args);
  const KeySections sections =
      choose_sections(layer.shape, layer.kv, args.launch, step.sequence_count, step.chunks,
                      step.most_pages, step.tables.stride, step.scratch_bytes);
  if (sections.pages == 0) return kernels.prefill_mma(stream, args);
  launch_prefill_expanded(stream, args, sections);
}

}  // namespace

void check_heads(const backend::AttentionShape& shape) {
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
}

void launch_attention(cudaStream_t stream, const AttentionLayer& layer,
                      const AttentionLaunch& launch, const AttentionArgs& step) {
  check_heads(layer.shape);
  const AttentionKernelArgs args = {layer, launch, step, static_cast<__half*>(step.workspace)};
  const FormatKernels kernels = kernels_of(layer.kv.format);
  if (launch.single_rows > 0) kernels.decode(stream, args);
  if (launch.rows > launch.single_rows) {
    kernels.store(stream, args);
    launch_prefill(stream, args, kernels);
    if (layer.kv.restores_results()) launch_restore(stream, args);
  }
}

}  // namespace nibble::cuda
