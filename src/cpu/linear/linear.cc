#include "cpu/linear/linear.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "base/aligned_array.h"
#include "base/checked_math.h"
#include "base/error.h"
#include "cpu/linear/kernels.h"

namespace nibble::cpu {

using backend::Weight;
using backend::WeightSegment;
using quant::QuantType;

bool has_quantized_activations(QuantType type) {
  switch (type) {
    case QuantType::kQ4_K:
    case QuantType::kQ5_K:
    case QuantType::kQ6_K:
    case QuantType::kQ8_0:
    case QuantType::kQ4_0:
      return true;
    default:
      return false;
  }
}

const Kernels& linear_kernels(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return kScalarKernels;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
#elif defined(__aarch64__)
    case Isa::kNeon:
      return kNeonKernels;
#endif
    default:
      break;
  }
  NIBBLE_CHECK(!"an instruction set of this machine");
  std::abort();  // not reached
}

void dequantize_chunk(const TileJob& job, uint32_t column, uint32_t columns) {
  const quant::QuantTraits& traits = *job.traits;
  const size_t offset = column / traits.block_values * traits.block_bytes;
  const size_t bytes = columns / traits.block_values * traits.block_bytes;
  for (uint32_t n = 0; n < job.rows; ++n) {
    traits.dequantize({job.weights + n * job.row_bytes + offset, bytes},
                      {reinterpret_cast<float*>(job.scratch->rows[n]), columns});
  }
}

namespace {

// Tiles of a whole weight, segment after segment.
uint32_t count_tiles(const Weight& weight, uint32_t tile_rows) {
  uint32_t tiles = 0;
  for (const WeightSegment& segment : weight.segments) tiles += ceil_div(segment.rows, tile_rows);
  return tiles;
}

// How many rows of activations, `row_bytes` each, to run together: so many stay in the second-level
// cache while all the weights pass by, enough to make unpacking these a small part of the work.
size_t rows_at_a_time(size_t row_bytes) {
  constexpr size_t kCachedBytes = 512 << 10;
  constexpr size_t kLeast = 32;
  return std::max(kLeast, kCachedBytes / row_bytes / kLeast * kLeast);
}

}  // namespace

struct Linear::Workspace {
  Workspace(Isa isa, ThreadPool& pool, uint32_t max_rows, uint32_t max_columns)
      : kernels(linear_kernels(isa)),
        pool(pool),
        max_rows(max_rows),
        max_columns(max_columns),
        activations(size_t{max_rows} * ceil_div(max_columns, ActivationGroup::kValues)),
        scratch(pool.size()),
        sums(size_t{pool.size()} * max_rows * kMaxTileRows) {
    // Lanes without a row may compute with what lies there.
    std::memset(static_cast<void*>(scratch.data()), 0, scratch.bytes());
  }

  void quantize(const float* x, size_t rows, uint32_t columns);
  // Tiles [begin, end) of the weight: unpack, multiply with the rows [first, first + rows), put the
  // sums in their places.
  void run_tiles(const Weight& weight, const float* x, size_t first, size_t rows, float* y,
                 size_t begin, size_t end, uint32_t thread);

  const Kernels& kernels;
  ThreadPool& pool;
  const uint32_t max_rows, max_columns;
  AlignedArray<ActivationGroup> activations;  // [rows, columns / 32]
  AlignedArray<TileScratch> scratch;          // [thread]
  AlignedArray<float> sums;                   // [thread, max_rows, lanes]
};

void Linear::Workspace::quantize(const float* x, size_t rows, uint32_t columns) {
  const size_t groups = columns / ActivationGroup::kValues;
  const auto quantize_rows = [&](size_t begin, size_t end, uint32_t) {
    for (size_t row = begin; row < end; ++row) {
      kernels.quantize(x + row * columns, columns, activations.data() + row * groups);
    }
  };
  constexpr size_t kRowsPerChunk = 4;  // a few microseconds
  if (rows <= kRowsPerChunk) {
    quantize_rows(0, rows, 0);
  } else {
    pool.for_each_chunk(rows, kRowsPerChunk, quantize_rows);
  }
}

void Linear::Workspace::run_tiles(const Weight& weight, const float* x, size_t first, size_t rows,
                                  float* y, size_t begin, size_t end, uint32_t thread) {
  const uint32_t tile_rows = kernels.tile_rows;
  const size_t y_width = weight.rows();
  size_t segment_tile = 0;  // the segment's first
  size_t segment_row = 0;
  for (const WeightSegment& segment : weight.segments) {
    const size_t tiles = ceil_div(segment.rows, tile_rows);
    const size_t row_bytes = quant::row_bytes(segment.type, weight.columns);
    for (size_t tile = std::max(begin, segment_tile); tile < std::min(end, segment_tile + tiles);
         ++tile) {
      const size_t row = (tile - segment_tile) * tile_rows;
      TileJob job;
      job.weights = segment.data.data() + row * row_bytes;
      job.row_bytes = row_bytes;
      job.rows = std::min<size_t>(tile_rows, segment.rows - row);
      job.columns = weight.columns;
      job.traits = &quant::quant_traits(segment.type);
      job.activation_rows = rows;
      job.quantized = activations.data() + first * (weight.columns / ActivationGroup::kValues);
      job.activations = x + first * weight.columns;
      const bool whole_tile_follows = row + 2 * tile_rows <= segment.rows;
      job.next_weights = job.weights + (whole_tile_follows ? tile_rows * row_bytes : 0);
      job.scratch = scratch.data() + thread;
      job.sums = sums.data() + size_t{thread} * max_rows * kMaxTileRows;
      kernels.multiply(job);
      for (size_t m = 0; m < rows; ++m) {
        std::copy_n(job.sums + m * tile_rows, job.rows,
                    y + (first + m) * y_width + segment_row + row);
      }
    }
    segment_tile += tiles;
    segment_row += segment.rows;
  }
}

Linear::Linear(Isa isa, ThreadPool& pool, uint32_t max_rows, uint32_t max_columns)
    : workspace_(std::make_unique<Workspace>(isa, pool, max_rows, max_columns)) {}
Linear::~Linear() = default;

void Linear::run(const Weight& weight, const float* x, size_t rows, float* y) {
  Workspace& workspace = *workspace_;
  NIBBLE_CHECK(rows <= workspace.max_rows && weight.columns <= workspace.max_columns);
  const auto takes_quantized = [](const WeightSegment& segment) {
    return has_quantized_activations(segment.type);
  };
  if (std::ranges::any_of(weight.segments, takes_quantized)) {
    workspace.quantize(x, rows, weight.columns);
  }
  const size_t row_bytes = std::ranges::all_of(weight.segments, takes_quantized)
                               ? weight.columns / ActivationGroup::kValues * sizeof(ActivationGroup)
                               : weight.columns * sizeof(float);
  const size_t block = rows_at_a_time(row_bytes);

  const uint32_t tiles = count_tiles(weight, workspace.kernels.tile_rows);
  // Enough chunks to even out threads of unequal speed, few enough to be worth a hand-over and the
  // first tile of each, which nobody fetched ahead.
  constexpr uint32_t kChunksPerThread = 4;
  const uint32_t grain = ceil_div(tiles, workspace.pool.size() * kChunksPerThread);
  for (size_t first = 0; first < rows; first += block) {
    const size_t count = std::min(block, rows - first);
    workspace.pool.for_each_chunk(tiles, grain, [&](size_t begin, size_t end, uint32_t thread) {
      workspace.run_tiles(weight, x, first, count, y, begin, end, thread);
    });
  }
}

uint64_t Linear::workspace_bytes() const {
  return workspace_->activations.bytes() + workspace_->scratch.bytes() + workspace_->sums.bytes();
}

void gather_row(const Weight& weight, uint32_t row, float* out) {
  for (const WeightSegment& segment : weight.segments) {
    if (row < segment.rows) {
      const size_t row_bytes = quant::row_bytes(segment.type, weight.columns);
      quant::quant_traits(segment.type)
          .dequantize(segment.data.subspan(row * row_bytes, row_bytes), {out, weight.columns});
      return;
    }
    row -= segment.rows;
  }
  NIBBLE_CHECK(!"row of the weight");
}

}  // namespace nibble::cpu
