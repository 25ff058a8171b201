#pragma once
// A plan's matrices in device memory: packed into this room's layouts, or as the file has them.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "backend/plan.h"
#include "base/progress.h"
#include "cuda/device_array.h"
#include "cuda/layouts/arrangement.h"
#include "cuda/linear/few_rows.h"

namespace nibble::cuda {

// What one kernel multiplies: rows of one layout, or of two.
struct MatrixPart {
  LayoutId first;
  std::optional<LayoutId> second;
  WeightRows rows[2];

  LayoutId layout(uint32_t i) const { return i == 0 ? first : *second; }
};

struct DeviceMatrix {
  uint32_t rows;
  uint32_t columns;
  uint64_t bytes;
  std::vector<MatrixPart> parts;
};

// Bytes of device memory that DeviceWeights takes for the plan.
uint64_t stored_bytes(const backend::Plan& plan, backend::WeightStorage storage);

class DeviceWeights {
 public:
  // Copies the plan's weights and packs them if `storage` says so, several threads side by side.
  // Throws Error(kUnsupported) that names a tensor with values beyond f16's range. Weights that
  // are packed already can't be stored directly.
  DeviceWeights(const backend::Plan& plan, backend::WeightStorage storage,
                const Progress& progress);

  const DeviceMatrix& matrix(backend::WeightId id) const { return matrices_[id.value]; }
  std::span<const std::byte> memory() const { return {memory_.data(), memory_.size()}; }

 private:
  DeviceArray<std::byte> memory_;
  std::vector<DeviceMatrix> matrices_;
};

}  // namespace nibble::cuda
