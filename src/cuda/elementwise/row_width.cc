#include "base/error.h"
#include "cuda/elementwise/elementwise.h"

namespace nibble::cuda {

void check_row_width(uint32_t width, uint32_t most) {
  if (width <= most) return;
  fail(ErrorCode::kUnsupported, "rows of {} values are too wide for this backend, which takes {}",
       width, most);
}

}  // namespace nibble::cuda
