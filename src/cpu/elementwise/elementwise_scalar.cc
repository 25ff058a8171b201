#define NIBBLE_SIMD_LANES 1
#include "cpu/elementwise/elementwise_kernels.h"

namespace nibble::cpu {
const ElementwiseKernels kElementwiseScalar = kElementwiseKernels;
}  // namespace nibble::cpu
