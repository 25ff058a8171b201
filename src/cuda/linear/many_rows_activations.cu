#include "cuda/linear/launch_many_rows.h"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kThreads = 256;

// A thread takes one step of a row in one tile: the 64 bytes in which the tile's four lanes have
// their 4 pairs become 64 bytes of 4 chunks, each with one pair of every lane.
__global__ void __launch_bounds__(kThreads)
    block_activations(const __grid_constant__ ActivationRows from,
                      const __grid_constant__ ActivationBlocks to) {
  ptx::wait_for_dependencies();
  ptx::launch_dependents();
  const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
  const uint32_t step = index % 8, row = index / 8 % to.rows, tile = index / 8 / to.rows;
  if (tile >= to.column_tiles) return;
  const uint32_t first = row / kMostRows * kMostRows, rows = min(to.rows - first, kMostRows);
  const uint4* const chunks = reinterpret_cast<const uint4*>(
      from.values + uint64_t(first) * to.column_tiles * kTileColumns +
      activation_index(row - first, tile * kTileColumns + 8 * step, rows));
  uint32_t words[4][4];  // [lane][pair]
#pragma unroll
  for (int lane = 0; lane < 4; ++lane) *reinterpret_cast<uint4*>(words[lane]) = chunks[lane];
#pragma unroll
  for (uint32_t pair = 0; pair < 4; ++pair) {
    const uint64_t at =
        activation_block_index(row, tile * kTileColumns + 8 * step + 2 * pair, to.row_groups());
    *reinterpret_cast<uint4*>(to.values + at) = {words[0][pair], words[1][pair], words[2][pair],
                                                 words[3][pair]};
  }
}

}  // namespace

void launch_block_activations(cudaStream_t stream, const ActivationRows& from,
                              const ActivationBlocks& to) {
  const uint32_t threads = to.column_tiles * to.rows * 8;
  launch_dependent(stream, block_activations, (threads + kThreads - 1) / kThreads, kThreads, 0,
                   from, to);
}

}  // namespace nibble::cuda
