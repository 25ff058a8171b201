#if defined(__x86_64__)
#define NIBBLE_SIMD_LANES 8
#include "cpu/elementwise/elementwise_kernels.h"

namespace nibble::cpu {
const ElementwiseKernels kElementwiseAvx2 = kElementwiseKernels;
}  // namespace nibble::cpu
#endif
