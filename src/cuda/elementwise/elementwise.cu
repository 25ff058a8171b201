#include <algorithm>

#include "cuda/elementwise/elementwise.h"
#include "cuda/elementwise/row.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr int kManyTiles = 4;  // pieces that a lane holds of a wide row
// Of more rows than this each one is a block's own, whose lanes hold kTilesOfMany pieces: a cluster
// is through a row sooner, but has less of it on the way (docs/measurements/prefill.md).
constexpr uint32_t kMostClusterRows = 128;
constexpr int kTilesOfMany = 2;
// Of a block whose lanes hold so many pieces: few pieces leave registers for few warps only.
constexpr uint32_t most_warps(int tiles) {
  return kMostWarps / kManyTiles * uint32_t(tiles);
}
constexpr uint32_t kMostSharers = 4;      // blocks of a multiprocessor, of many rows
constexpr uint32_t kRuntimeBytes = 1024;  // of shared memory that every block costs besides its own
constexpr uint32_t kGeluWarps = 4;        // of a block that is one of many
constexpr uint32_t kSumThreads = 256;
constexpr uint32_t kSumColumns = 4 * kSumThreads;  // of a block: its loads are under way together
// A sum of squares this much smaller than its parts has lost 3 of its 24 bits to their difference.
constexpr float kCancelled = 1.0f / 8;

uint32_t tiles_of(uint32_t width) {
  return (width + kTileColumns - 1) / kTileColumns;
}

template <class Layout, int kTiles>
__global__ void __launch_bounds__(most_warps(kTiles) * kLanes)
    embed_kernel(const __grid_constant__ EmbedArgs args) {
  __shared__ ReduceShared<RowFacts<1, 1>> shared;
  const ClusterPlace place;
  ptx::launch_dependents();
  cluster_sync(place);
  const uint32_t row = blockIdx.x / place.blocks, width = args.width;
  const auto weight = load_weights<kTiles>(place, args.norm, width);
  if (!args.tokens) ptx::wait_for_dependencies();
  const uint32_t token = args.tokens ? uint32_t(args.tokens[row]) : row;
  const uint32_t column_tiles = (width + kTileColumns - 1) / kTileColumns;
  const Layout* const tiles =
      static_cast<const Layout*>(args.tiles) + uint64_t(token / kTileRows) * column_tiles;
  Row<kTiles> x;
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t column) {
    const Layout& tile = tiles[column / kTileColumns];
#pragma unroll
    for (uint32_t j = 0; j < kPieceColumns; ++j)
      x.values[i][j] = args.scale * tile.value(token % kTileRows, column % kTileColumns + j);
    store_piece(args.residual + uint64_t(row) * width, column, width, x.values[i]);
  });
  store_normed(place, x, weight, args.norm.epsilon, width, args.normed, row, shared);
}

template <int kTiles>
__global__ void __launch_bounds__(most_warps(kTiles) * kLanes)
    update_kernel(const __grid_constant__ UpdateArgs args) {
  // Sums of squares of the product, and of the weighted product, the residual, and their product.
  __shared__ ReduceShared<RowFacts<4, 0>> shared;
  __shared__ ReduceShared<RowFacts<1, 1>> normed_shared;
  const ClusterPlace place;
  const uint32_t row = blockIdx.x / place.blocks, width = args.width;
  ptx::launch_dependents();
  // Lanes that hold much of a row have no registers for weights that they don't need yet.
  constexpr bool kWeightsFirst = kTiles == 1;
  const DeviceNorm post_norm = args.has_post_norm ? args.post_norm : DeviceNorm{};
  Row<kTiles> post_weight, next_weight;
  if (kWeightsFirst) {
    post_weight = load_weights<kTiles>(place, post_norm, width);
    next_weight = load_weights<kTiles>(place, args.next_norm, width);
  }
  cluster_sync(place);
  ptx::wait_for_dependencies();

  float* const residual = args.residual + uint64_t(row) * width;
  const float scale = args.scales[row];
  Row<kTiles> x, old;
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t column) {
    load_piece(residual, column, width, old.values[i]);
    load_sums(args.sums, scale, row, 0, column, width, x.values[i]);
  });
  RowFacts<4, 0> own = {};
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t column) {
    if (!kWeightsFirst) load_weight(post_norm, column, width, post_weight.values[i]);
#pragma unroll
    for (uint32_t j = 0; j < kPieceColumns; ++j) {
      float& value = x.values[i][j];
      own.values[0] += value * value;
      value *= post_weight.values[i][j];
      own.values[1] += value * value;
      own.values[2] += old.values[i][j] * old.values[i][j];
      own.values[3] += value * old.values[i][j];
    }
  });
  if (!kWeightsFirst) next_weight = load_weights<kTiles>(place, args.next_norm, width);
  // The squares of the new residual follow from these: a second exchange would take as long again.
  const auto [product, weighted, before, both] = reduce_row(place, own, shared).values;
  const float factor =
      args.has_post_norm ? 1 / sqrtf(product / float(width) + args.post_norm.epsilon) : 1;
  const float apart = before + factor * factor * weighted;
  const float squares = apart + 2 * factor * both;
  for_each_piece<kTiles>(place, width, [&](int i, uint32_t column) {
#pragma unroll
    for (uint32_t j = 0; j < kPieceColumns; ++j)
      x.values[i][j] = (old.values[i][j] + x.values[i][j] * factor) * args.output_scale;
    store_piece(residual, column, width, x.values[i]);
  });
  if (squares < kCancelled * apart || !args.next_norm.in_range) {
    store_normed(place, x, next_weight, args.next_norm.epsilon, width, args.normed, row,
                 normed_shared);
    return;
  }
  const float mean = args.output_scale * args.output_scale * squares / float(width);
  store_row(place, x, next_weight, 1 / sqrtf(mean + args.next_norm.epsilon), 1, width, args.normed,
            row);
}

template <int kTiles>
__global__ void __launch_bounds__(most_warps(kTiles) * kLanes)
    norm_kernel(const __grid_constant__ NormArgs args) {
  __shared__ ReduceShared<RowFacts<1, 1>> shared;
  const ClusterPlace place;
  const uint32_t row = blockIdx.x / place.blocks;
  ptx::launch_dependents();
  const auto weight = load_weights<kTiles>(place, args.norm, args.width);
  cluster_sync(place);
  ptx::wait_for_dependencies();
  const float* const from = args.residual + uint64_t(args.rows[row]) * args.width;
  Row<kTiles> x;
  for_each_piece<kTiles>(place, args.width, [&](int i, uint32_t column) {
    load_piece(from, column, args.width, x.values[i]);
  });
  store_normed(place, x, weight, args.norm.epsilon, args.width, args.normed, row, shared);
}

// x / 2 * (1 + tanh(u)) is x / (1 + e^(-2u)).
__device__ __forceinline__ float gelu_tanh(float x) {
  const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
  return __fdividef(x, 1 + __expf(-2 * u));
}

// A warp has a tile of a row.
__global__ void __launch_bounds__(kGeluWarps* kLanes)
    gated_gelu_kernel(const __grid_constant__ GatedArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  const uint32_t row = blockIdx.y, width = args.width;
  const uint32_t column = (blockIdx.x * blockDim.x + threadIdx.x) * kPieceColumns;
  if (column / kTileColumns >= args.gated.rows.column_tiles) return;
  const float scale = args.scales[row], gated_scale = *args.gated_scale;
  float gate[kPieceColumns], up[kPieceColumns];
  load_sums(args.sums, scale, row, 0, column, width, gate);
  load_sums(args.sums, scale, row, width, column, width, up);
  const float inverse_scale = 1 / gated_scale;
  bool overflow = false;
#pragma unroll
  for (uint32_t i = 0; i < kPieceColumns; ++i) {
    gate[i] = gelu_tanh(gate[i]) * up[i] * inverse_scale;
    overflow |= fabsf(gate[i]) > kLargestHalf;
  }
  if (overflow) *args.overflow = 1;
  store_activation_tile(args.gated.rows, row, column, gate);
  if (column == 0) args.gated.scales[row] = gated_scale;
}

__global__ void sum_kernel(const __grid_constant__ SumArgs args) {
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  const uint32_t first = blockIdx.x * kSumColumns + threadIdx.x, row = blockIdx.y;
  const float* const from = args.sums.values + uint64_t(row) * args.sums.stride;
  const uint64_t part_stride = uint64_t(args.sums.rows) * args.sums.stride;
  const float scale = args.scales[row];
  float sums[kSumColumns / kSumThreads] = {};
  const auto for_each = [&](const auto& body) {
#pragma unroll
    for (uint32_t i = 0; i < kSumColumns / kSumThreads; ++i) {
      const uint32_t column = first + i * kSumThreads;
      if (column < args.width) body(sums[i], column);
    }
  };
  for (uint32_t part = 0; part < args.sums.parts; ++part)
    for_each([&](float& sum, uint32_t column) { sum += from[part * part_stride + column]; });
  for_each([&](float sum, uint32_t column) {
    sum *= scale;
    if (args.softcap != 0) sum = args.softcap * tanhf(sum / args.softcap);
    args.out[uint64_t(row) * args.width + column] = sum;
  });
}

// How a row of `width` columns is shared.
struct RowLaunch {
  uint32_t blocks;
  uint32_t threads;  // of a block
  bool wide;         // a lane holds more than one piece
};
RowLaunch choose_row_launch(uint32_t width) {
  const uint32_t tiles = tiles_of(width);
  const uint32_t blocks = has_clusters() && tiles >= kMostBlocks ? kMostBlocks : 1;
  check_row_width(width, kMostRowColumns * blocks);
  const uint32_t tiles_per_block = (tiles + blocks - 1) / blocks;
  return {blocks, std::min(tiles_per_block, kMostWarps) * kLanes, tiles_per_block > most_warps(1)};
}

// Shared memory that a block asks for to no use of its own. The matrix-vector kernel in front
// leaves one multiprocessor after the other, and the first ones would take all blocks of many rows,
// which read its many parts (docs/measurements/batches.md).
uint32_t spreading_bytes(const ActivationRows& rows) {
  if (rows.rows <= kMatrixTokens || rows.in_blocks) return 0;
  return device_shape().shared_bytes_per_block / kMostSharers - kRuntimeBytes;
}

template <class Kernel, class Args>
void launch_rows(cudaStream_t stream, Kernel narrow, Kernel wide, const Args& args) {
  const RowLaunch launch = choose_row_launch(args.width);
  const Kernel kernel = launch.wide ? wide : narrow;
  const uint32_t shared_bytes = spreading_bytes(args.normed.rows);
  NIBBLE_CUDA(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  launch_dependent_clusters(stream, kernel, args.normed.rows.rows, launch.blocks, launch.threads,
                            shared_bytes, args);
}

}  // namespace

void launch_embed(cudaStream_t stream, const EmbedArgs& args) {
  visit_layout(args.layout, [&](auto layout) {
    using Layout = typename decltype(layout)::type;
    launch_rows(stream, embed_kernel<Layout, 1>, embed_kernel<Layout, kManyTiles>, args);
  });
}

void launch_update(cudaStream_t stream, const UpdateArgs& args) {
  const uint32_t rows = args.sums.rows;
  const uint32_t warps = (tiles_of(args.width) + kTilesOfMany - 1) / kTilesOfMany;
  if (rows > kMostClusterRows && warps <= most_warps(kTilesOfMany))
    return launch_dependent(stream, update_kernel<kTilesOfMany>, rows, warps * kLanes, 0, args);
  launch_rows(stream, update_kernel<1>, update_kernel<kManyTiles>, args);
}

void launch_norm(cudaStream_t stream, const NormArgs& args) {
  launch_rows(stream, norm_kernel<1>, norm_kernel<kManyTiles>, args);
}

void launch_gated_gelu(cudaStream_t stream, const GatedArgs& args) {
  check_row_width(args.width, args.width);
  const uint32_t rows = args.sums.rows, warps = rows > kMostRows ? kGeluWarps : 1;
  const uint32_t blocks = (tiles_of(args.width) + warps - 1) / warps;
  launch_dependent(stream, gated_gelu_kernel, dim3(blocks, rows), warps * kLanes, 0, args);
}

void launch_sum(cudaStream_t stream, const SumArgs& args) {
  const uint32_t blocks = (args.width + kSumColumns - 1) / kSumColumns;
  launch_dependent(stream, sum_kernel, dim3(blocks, args.sums.rows), kSumThreads, 0, args);
}

}  // namespace nibble::cuda
