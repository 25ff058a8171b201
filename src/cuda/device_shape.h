#pragma once
// What the choice of a kernel depends on, besides sizes.

#include <cstdint>

namespace nibble::cuda {

struct DeviceShape {
  uint32_t multiprocessors;
  uint32_t shared_bytes_per_block;  // the most that a block may ask for
};

// Which instructions multiply matrices: Hopper's asynchronous ones, or those that Ampere has and
// all later devices keep.
enum class MatrixUnit { kWgmma, kMma };
// architecture: what the kernels' code was compiled for, as kernel_architecture() says
constexpr MatrixUnit matrix_unit_of(uint32_t architecture) {
  return architecture == 90 ? MatrixUnit::kWgmma : MatrixUnit::kMma;
}

}  // namespace nibble::cuda
