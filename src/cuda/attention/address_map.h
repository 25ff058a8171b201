#pragma once
// Memory as a tensor, for the copy engine.

#include <cuda.h>

#include <cstdint>

namespace nibble::cuda {

// Boxes of `rows` rows of 64 f16 values, `row_bytes` apart, at any address that is a multiple of
// 16; in shared memory swizzled as ptx::matrix_descriptor() wants. Coordinates: 0, 0, bits 4 to 15
// of the address, the bits from 16 on.
CUtensorMap address_map(uint32_t rows, uint32_t row_bytes);

}  // namespace nibble::cuda
