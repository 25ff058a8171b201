#pragma once
// What all kernels of this folder are given, and the host functions that start them.

#include <cuda_fp16.h>

#include "cuda/attention/attention.h"

namespace nibble::cuda {

// The part of the keys that one launch of the prefill kernel on wgmma attends to: of each sequence
// the pages [first, first + pages), counted from the first one that its rows see. What is known
// after a section goes to the launch for the next one by way of `state`.
struct KeySection {
  uint32_t first = 0;
  uint32_t pages = 0;  // 0: all there are, and no state
  bool is_first = true, is_last = true;
  float4* state = nullptr;  // [blocks, PrefillWgmmaShape::kStateVectors]
};

struct AttentionKernelArgs {
  AttentionLayer layer;
  AttentionLaunch launch;
  AttentionArgs step;
  __half* queries;  // the workspace
  KeySection section = {};
};

// Single rows.
void launch_decode_f16(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_decode_q8(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_decode_tq4(cudaStream_t stream, const AttentionKernelArgs& args);
// The other rows: queries to the workspace, keys and values to their pages; then attention; then,
// where restores_results(), what it left in the workspace to the output.
void launch_store_f16(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_store_q8(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_store_tq4(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_prefill_f16_wgmma(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_prefill_f16_mma(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_prefill_q8_mma(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_prefill_tq4_mma(cudaStream_t stream, const AttentionKernelArgs& args);
// Compressed keys and values on wgmma, by sections that are expanded to f16.
void launch_prefill_expanded(cudaStream_t stream, const AttentionKernelArgs& args,
                             const KeySections& sections);
void launch_restore(cudaStream_t stream, const AttentionKernelArgs& args);

// Calls body<head_dim>() for a head_dim that kernels exist for.
template <class Body>
void with_head_dim(const AttentionKernelArgs& args, const Body& body) {
  switch (args.layer.shape.head_dim) {
    case 64:
      return body.template operator()<64>();
    case 128:
      return body.template operator()<128>();
    case 256:
      return body.template operator()<256>();
    default:
      return body.template operator()<512>();
  }
}

}  // namespace nibble::cuda
