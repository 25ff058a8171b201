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
  // A tile of rows is dequantised once for all tokens and stays in the core's cache. Converting
  // to double once, too, leaves the inner loop nothing but products and sums.
  constexpr size_t kTileRows = 4;
  const size_t rows = weight.rows();
  const size_t columns = weight.columns;
  const size_t tokens = input.size() / columns;
  const std::vector<double> x(input.begin(), input.end());
  struct Scratch {
    std::vector<float> row;    // [columns]
    std::vector<double> tile;  // [kTileRows, columns]
  };
  const Scratch scratch{std::vector<float>(columns), std::vector<double>(kTileRows * columns)};
  std::vector<Scratch> scratches(pool.size(), scratch);
  pool.for_each_chunk(rows, kTileRows, [&](size_t begin, size_t end, uint32_t thread) {
    auto& [values, tile] = scratches[thread];
    for (size_t row = begin; row < end; ++row) {
      dequantize_row(weight, uint32_t(row), values);
      std::ranges::copy(values, tile.begin() + ptrdiff_t((row - begin) * columns));
    }
    for (size_t token = 0; token < tokens; ++token) {
      for (size_t row = begin; row < end; ++row) {
        output[token * rows + row] =
            float(dot(std::span<const double>(&tile[(row - begin) * columns], columns),
                      std::span<const double>(&x[token * columns], columns)));
      }
    }
  });
}

}  // namespace nibble::reference
