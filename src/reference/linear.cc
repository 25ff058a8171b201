#include "reference/linear.h"

#include <algorithm>
#include <vector>

#include "base/error.h"
#include "reference/steps.h"

namespace nibble::reference {

void dequantize_row(const backend::Weight& weight, uint32_t row, std::span<float> values) {
  for (const backend::WeightSegment& segment : weight.segments) {
    if (row < segment.rows) {
      const uint64_t bytes = quant::row_bytes(segment.type, weight.columns);
      quant::quant_traits(segment.type)
          .dequantize(segment.data.subspan(row * bytes, bytes), values);
      return;
    }
    row -= segment.rows;
  }
  NIBBLE_CHECK(!"the weight has so many rows");
}

void linear(ThreadPool& pool, const backend::Weight& weight, std::span<const float> input,
            std::span<float> output) {
  // A tile of rows is dequantised once for all tokens and stays in the core's cache.
  constexpr size_t kTileRows = 8;
  const size_t rows = weight.rows();
  const size_t columns = weight.columns;
  const size_t tokens = input.size() / columns;
  const size_t tile_values = kTileRows * columns;
  std::vector<float> tiles(pool.size() * tile_values);
  pool.for_each_chunk(rows, kTileRows, [&](size_t begin, size_t end, uint32_t thread) {
    const std::span tile = std::span(tiles).subspan(thread * tile_values, tile_values);
    for (size_t row = begin; row < end; ++row) {
      dequantize_row(weight, uint32_t(row), tile.subspan((row - begin) * columns, columns));
    }
    for (size_t token = 0; token < tokens; ++token) {
      const std::span x = input.subspan(token * columns, columns);
      for (size_t row = begin; row < end; ++row) {
        output[token * rows + row] = float(dot(tile.subspan((row - begin) * columns, columns), x));
      }
    }
  });
}

}  // namespace nibble::reference
