#if defined(__aarch64__)
#define NIBBLE_SIMD_LANES 4
#include "cpu/elementwise/elementwise_kernels.h"

namespace nibble::cpu {
const ElementwiseKernels kElementwiseNeon = kElementwiseKernels;
}  // namespace nibble::cpu
#endif
