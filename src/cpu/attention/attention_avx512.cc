#if defined(__x86_64__)
#define NIBBLE_SIMD_LANES 16
#include "cpu/attention/attention_kernels.h"

namespace nibble::cpu {
const AttentionKernels kAttentionAvx512 = kAttentionKernels;
}  // namespace nibble::cpu
#endif
