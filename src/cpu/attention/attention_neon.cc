#if defined(__aarch64__)
#define NIBBLE_SIMD_LANES 4
#include "cpu/attention/attention_kernels.h"

namespace nibble::cpu {
const AttentionKernels kAttentionNeon = kAttentionKernels;
}  // namespace nibble::cpu
#endif
