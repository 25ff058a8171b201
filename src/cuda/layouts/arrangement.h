#pragma once
// Where a plan's matrices go, in which layouts: the same on a device and in a packed model.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/plan.h"
#include "cuda/layouts/layouts.h"

namespace nibble::cuda {

// The layout that keeps a type's values: its own, or F16 for types without one. F16 holds the
// values of Q4_0-like formats with few bits to nearest, as the kernels take all weights in f16.
LayoutId layout_of(quant::QuantType type);

// The type whose blocks a segment of `type` is packed from: its own or F16.
quant::QuantType packed_from(quant::QuantType type);

// Consecutive segments whose tiles lie one behind the other. A segment's tiles are the same as if
// it were packed alone: all but a run's last one have whole tiles of rows.
struct Run {
  LayoutId layout;
  uint32_t first_row;  // of the weight
  uint32_t rows;
  std::vector<const backend::WeightSegment*> segments;
  uint64_t offset;  // among all weights
};

uint64_t packed_bytes(LayoutId layout, uint32_t rows, uint32_t columns);
// The same of rows that may be stored as the blocks that they would be packed from.
uint64_t stored_bytes(LayoutId layout, uint32_t rows, uint32_t columns,
                      backend::WeightStorage storage);

// Places all runs one behind the other; weights that are the same tensors share theirs.
struct Arrangement {
  std::vector<std::vector<Run>> runs;            // [distinct weight]
  std::vector<const backend::Weight*> distinct;  // the first plan weight that each one is
  std::vector<size_t> of_weight;                 // [plan weight]
  uint64_t bytes = 0;

  // Refers to the plan's segments. Every run begins at a multiple of `alignment`.
  Arrangement(const backend::Plan& plan, uint64_t alignment,
              backend::WeightStorage storage = backend::WeightStorage::kPacked);
};

// Rows of a segment that is not packed yet, as blocks of packed_from(its type). Throws
// Error(kUnsupported) that names a tensor with values beyond f16's range.
void read_blocks(const backend::WeightSegment& segment, uint32_t columns, uint32_t first_row,
                 uint32_t rows, std::byte* to);

// The same rows as tiles; `first_row` is a multiple of kTileRows, `tiles` aligned for any layout.
void pack_rows(const backend::WeightSegment& segment, uint32_t columns, uint32_t first_row,
               uint32_t rows, std::byte* tiles);

}  // namespace nibble::cuda
