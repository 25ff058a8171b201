#define NIBBLE_SIMD_LANES 1
#include "cpu/attention/attention_kernels.h"

namespace nibble::cpu {
const AttentionKernels kAttentionScalar = kAttentionKernels;
}  // namespace nibble::cpu
