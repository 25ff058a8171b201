#include "cpu/elementwise/elementwise.h"

namespace nibble::cpu {

const ElementwiseKernels& elementwise_kernels(Isa isa) {
  switch (isa) {
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kElementwiseAvx2;
    case Isa::kAvx512:
      return kElementwiseAvx512;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kElementwiseNeon;
#endif
    default:
      return kElementwiseScalar;
  }
}

}  // namespace nibble::cpu
