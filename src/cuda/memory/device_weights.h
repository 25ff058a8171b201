#pragma once
// A plan's matrices, packed into this room's layouts in device memory.

#include <cstddef>
#include <cstdint>
#include <optional>
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
  PackedRows rows[2];
};

struct DeviceMatrix {
  uint32_t rows;
  uint32_t columns;
  uint64_t bytes;  // packed
  std::vector<MatrixPart> parts;
};

// Bytes of device memory that DeviceWeights takes for the plan.
uint64_t packed_bytes(const backend::Plan& plan);

class DeviceWeights {
 public:
  // Copies and packs the plan's weights, several threads side by side. Throws
  // Error(kUnsupported) that names a tensor with values beyond f16's range.
  DeviceWeights(const backend::Plan& plan, const Progress& progress);

  const DeviceMatrix& matrix(backend::WeightId id) const { return matrices_[id.value]; }
  uint64_t bytes() const { return memory_.size(); }

 private:
  DeviceArray<std::byte> memory_;
  std::vector<DeviceMatrix> matrices_;
};

}  // namespace nibble::cuda
