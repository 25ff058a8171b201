#include "base/error.h"
#include "cuda/elementwise/elementwise.h"

namespace nibble::cuda {

void check_row_width(uint32_t width, uint32_t most) {
  if (width > most) {
    fail(ErrorCode::kUnsupported, "rows of {} values are too wide for this backend, which takes {}",
         width, most);
  }
  if (width % kPieceColumns != 0) {
    fail(ErrorCode::kUnsupported,
         "rows of {} values: CUDA has kernels for multiples of {}; use --backend cpu", width,
         kPieceColumns);
  }
}

}  // namespace nibble::cuda
