#pragma once
// What all kernels of this folder are given, and the host functions that start them.

#include <cuda_fp16.h>

#include "cuda/attention/attention.h"

namespace nibble::cuda {

struct AttentionKernelArgs {
  AttentionLayer layer;
  AttentionLaunch launch;
  AttentionArgs step;
  __half* queries;  // the workspace
};

// Single rows. For one format, instances by head_dim.
void launch_decode_f16(cudaStream_t stream, const AttentionKernelArgs& args);
// The other rows: queries to the workspace, keys and values to their pages; then attention.
void launch_store_f16(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_prefill_f16_wgmma(cudaStream_t stream, const AttentionKernelArgs& args);
void launch_prefill_f16_mma(cudaStream_t stream, const AttentionKernelArgs& args);

}  // namespace nibble::cuda
