// Matrix-vector kernels as the decode step starts them, alone (layout x shape x rows, launch
// included) or, with --step, all of the 31B model's step in a row. Weights rotate through more
// memory than the L2 cache holds; every result is compared with a double-precision product of the
// same blocks dequantised on the host.

#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/layouts/pack.h"
#include "cuda/linear/launch_few_rows.h"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"
#include "report.h"
#include "timing.h"

namespace {

using namespace nibble;
using namespace nibble::cuda;

constexpr double kPeakGbPerS = 3089;  // reading alone, this card: docs/measurements/decode.md

std::mt19937 random_bits(std::random_device{}());
bench::Report report;

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(random_bits);
}
void set_half(uint8_t* bytes, float value) {
  const uint16_t bits = f32_to_f16(value);
  bytes[0] = uint8_t(bits);
  bytes[1] = uint8_t(bits >> 8);
}

// Scales as trained files have them, on random bits.
template <class Block>
void set_scales(Block& block) {
  if constexpr (requires { block.min_scale; }) {
    set_half(block.scale.bytes, uniform(1e-5f, 3e-4f));
    set_half(block.min_scale.bytes, uniform(1e-5f, 3e-3f));
  } else if constexpr (requires { block.high_bits; }) {
    set_half(block.scale.bytes, uniform(-3e-5f, 3e-5f));
  } else if constexpr (requires { block.scale; }) {
    set_half(block.scale.bytes, uniform(-3e-3f, 3e-3f));
  } else if constexpr (std::is_same_v<Block, quant::BlockF16>) {
    set_half(block.bytes, uniform(-0.05f, 0.05f));
  } else {
    const uint16_t bits = f32_to_bf16(uniform(-0.05f, 0.05f));
    block.bytes[0] = uint8_t(bits);
    block.bytes[1] = uint8_t(bits >> 8);
  }
}

// A matrix whose row tiles repeat a few random ones, out of step with its own.
template <class Layout>
struct Matrix {
  using Block = typename Layout::Block;
  static constexpr uint32_t kPoolRowTiles = 37;
  uint32_t rows, columns;
  std::vector<Block> pool;      // [kPoolRowTiles * kTileRows, columns]
  std::vector<Layout*> copies;  // on the device, different addresses, same contents

  Matrix(uint32_t rows, uint32_t columns, size_t total_bytes)
      : rows(rows),
        columns(columns),
        pool(size_t(kPoolRowTiles) * kTileRows * columns / Block::kValues) {
    for (Block& block : pool) {
      for (size_t i = 0; i < sizeof block; ++i)
        reinterpret_cast<uint8_t*>(&block)[i] = uint8_t(random_bits());
      set_scales(block);
    }
    const size_t pool_bytes = pool.size() * sizeof(Block);
    void* blocks;
    NIBBLE_CUDA(cudaMalloc(&blocks, pool_bytes));
    NIBBLE_CUDA(cudaMemcpy(blocks, pool.data(), pool_bytes, cudaMemcpyHostToDevice));
    const TileGrid grid(rows, columns);
    copies.resize(std::max<size_t>(1, (total_bytes + bytes() - 1) / bytes()));
    for (Layout*& copy : copies) {
      NIBBLE_CUDA(cudaMalloc(&copy, bytes()));
      for (uint32_t tile = 0; tile < grid.row_tiles; tile += kPoolRowTiles) {
        const uint32_t left = std::min(rows - tile * kTileRows, kPoolRowTiles * kTileRows);
        pack_on_device(nullptr, layout_id<Layout>(), blocks, left, columns, tile, copy);
      }
    }
    NIBBLE_CUDA(cudaDeviceSynchronize());
    NIBBLE_CUDA(cudaFree(blocks));
  }
  ~Matrix() {
    for (Layout* copy : copies) cudaFree(copy);
  }
  Matrix(const Matrix&) = delete;

  size_t bytes() const { return TileGrid(rows, columns).tiles() * sizeof(Layout); }

  void row_values(uint32_t row, std::vector<float>& values) const {
    const uint32_t row_blocks = columns / Block::kValues;
    const Block* blocks = pool.data() + size_t(row % (kPoolRowTiles * kTileRows)) * row_blocks;
    for (uint32_t i = 0; i < row_blocks; ++i)
      dequantize(blocks[i], values.data() + size_t(i) * Block::kValues);
  }
};

struct Activations {
  uint32_t rows, columns;
  std::vector<float> values;  // [rows, columns], already rounded to f16
  uint16_t* device_values;
  ActivationMeans* device_means;

  Activations(uint32_t rows, uint32_t columns) : rows(rows), columns(columns) {
    const uint32_t column_tiles = columns / kTileColumns;
    const uint32_t stride = activation_stride(rows);
    std::vector<uint16_t> packed(size_t(stride) * columns);
    std::vector<ActivationMeans> means(size_t(stride) * column_tiles);
    std::normal_distribution<float> normal;
    values.resize(size_t(rows) * columns);
    for (uint32_t row = 0; row < rows; ++row) {
      for (uint32_t group = 0; group < columns / 32; ++group) {
        double sum = 0;
        for (uint32_t column = 32 * group; column < 32 * group + 32; ++column) {
          const uint16_t bits = f32_to_f16(normal(random_bits));
          packed[activation_index(row, column, stride)] = bits;
          sum += values[size_t(row) * columns + column] = f16_to_f32(bits);
        }
        const float mean = float(sum / 32);
        auto& parts = means[size_t(group / 8) * stride + row].parts[group % 8 / 2];
        parts[0][group % 2] = f32_to_f16(mean);
        parts[1][group % 2] = f32_to_f16(mean - f16_to_f32(parts[0][group % 2]));
      }
    }
    NIBBLE_CUDA(cudaMalloc(&device_values, packed.size() * 2));
    NIBBLE_CUDA(
        cudaMemcpy(device_values, packed.data(), packed.size() * 2, cudaMemcpyHostToDevice));
    NIBBLE_CUDA(cudaMalloc(&device_means, means.size() * sizeof means[0]));
    NIBBLE_CUDA(cudaMemcpy(device_means, means.data(), means.size() * sizeof means[0],
                           cudaMemcpyHostToDevice));
  }
  ~Activations() {
    cudaFree(device_values);
    cudaFree(device_means);
  }
  Activations(const Activations&) = delete;
};

// |output - expected| / |expected| over sampled rows, in double.
template <class Layout>
double relative_error(const Matrix<Layout>& matrix, const Activations& activations,
                      const std::vector<float>& output, uint32_t parts) {
  std::vector<uint32_t> sample;
  for (uint32_t i = 0; i < 40; ++i) {
    sample.push_back(i % matrix.rows);
    sample.push_back(matrix.rows - 1 - i % matrix.rows);
    sample.push_back(random_bits() % matrix.rows);
  }
  std::vector<float> weights(matrix.columns);
  double difference = 0, magnitude = 0;
  for (const uint32_t row : sample) {
    matrix.row_values(row, weights);
    for (uint32_t i = 0; i < activations.rows; ++i) {
      double expected = 0;
      for (uint32_t k = 0; k < matrix.columns; ++k)
        expected += double(weights[k]) * activations.values[size_t(i) * matrix.columns + k];
      const size_t at = size_t(i) * matrix.rows + row;
      double actual = 0;
      for (uint32_t part = 0; part < parts; ++part)
        actual += output[size_t(part) * activations.rows * matrix.rows + at];
      difference += (actual - expected) * (actual - expected);
      magnitude += expected * expected;
    }
  }
  return std::sqrt(difference / magnitude);
}

struct Shape {
  const char* name;
  uint32_t rows, columns;
};

template <class Layout>
void measure(const Shape& shape, const Matrix<Layout>& matrix, uint32_t rows) {
  const Activations activations(rows, matrix.columns);
  const FewRowsLaunch launch = choose_few_rows(device_shape(), layout_id<Layout>(), matrix.rows, {},
                                               0, matrix.columns, rows);
  float* output;
  const size_t outputs = size_t(launch.parts) * rows * matrix.rows;
  NIBBLE_CUDA(cudaMalloc(&output, outputs * 4));
  NIBBLE_CUDA(cudaMemset(output, 0xff, outputs * 4));  // NaN where nothing is written
  FewRowsArgs args = {};
  args.weights[0] = {matrix.copies[0], matrix.rows, 0};
  args.column_tiles = TileGrid(matrix.rows, matrix.columns).column_tiles;
  args.rows = rows;
  args.activations = activations.device_values;
  args.means = activations.device_means;
  args.output = output;
  args.output_stride = matrix.rows;

  const auto start = [&](cudaStream_t stream, int i) {
    args.weights[0].data = matrix.copies[i % matrix.copies.size()];
    launch_few_rows(stream, layout_id<Layout>(), {}, args, launch);
  };
  start(nullptr, 0);
  NIBBLE_CUDA(cudaDeviceSynchronize());
  std::vector<float> result(outputs);
  NIBBLE_CUDA(cudaMemcpy(result.data(), output, outputs * 4, cudaMemcpyDeviceToHost));
  const double error = relative_error(matrix, activations, result, launch.parts);

  const std::string type(quant::quant_traits(Layout::kSource).name);
  const int launches = std::max<int>(24, 2 * int(matrix.copies.size()));
  const double us = bench::time_graph_us([&](cudaStream_t stream) {
                      for (int i = 0; i < launches; ++i) start(stream, i);
                    }) /
                    launches;
  // Bytes that must move: weights, activations once, the parts of the result.
  const double bytes = double(matrix.bytes()) +
                       double(rows) * (matrix.columns * 2 + matrix.rows * 4.0 * launch.parts);
  std::printf(
      "| %-9s | %6u x %-5u | %-4s | %u | %8.2f | %5.0f | %5.1f %% | %s, %u chunks | %.1e%s |\n",
      shape.name, matrix.rows, matrix.columns, type.c_str(), rows, us, bytes / us / 1e3,
      bytes / us / 10 / kPeakGbPerS, launch.wide ? "wide" : "narrow", launch.column_chunks, error,
      error < 1e-3 ? "" : " WRONG");
  std::fflush(stdout);
  report.add({{"matrix", shape.name},
              {"matrix_rows", matrix.rows},
              {"columns", matrix.columns},
              {"type", type},
              {"rows", rows},
              {"us", us},
              {"bytes_per_s", bytes / us * 1e6},
              {"bandwidth_fraction", bytes / us / 1e3 / kPeakGbPerS},
              {"relative_error", error}});
  NIBBLE_CUDA(cudaFree(output));
}

// --- --step: the matrices of a whole decode step of the 31B model, with what happens between ---

constexpr uint32_t kLayers = 60, kHidden = 5376, kFfn = 21504;
constexpr uint32_t kWindowPeriod = 6;  // the last of so many layers attends to everything
constexpr uint32_t kContext = 512;

bool is_full(uint32_t layer) {
  return layer % kWindowPeriod == kWindowPeriod - 1;
}
// The layers whose V and down matrices a Q4_K_M file stores in 6 bits.
bool has_more_bits(uint32_t layer) {
  return layer < kLayers / 8 || layer >= 7 * kLayers / 8 || (layer - kLayers / 8) % 3 == 2;
}

// A stand-in for the small kernels of one row: reads what the matrix in front made of `count`
// outputs, and `bytes` of other memory, adds all up over its cluster, and writes `out` activations.
struct BetweenArgs {
  const float* sums;  // [parts, count]
  uint32_t parts, count;
  const uint4* memory;
  uint32_t bytes;
  uint16_t* activations;  // [out]
  uint32_t out;
};

__global__ void between_kernel(const __grid_constant__ BetweenArgs args) {
  namespace groups = cooperative_groups;
  __shared__ float warp_sums[32];
  __shared__ float block_sum;
  ptx::launch_dependents();
  ptx::wait_for_dependencies();
  const groups::cluster_group cluster = groups::this_cluster();
  const uint32_t thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  float sum = 0;
  for (uint32_t i = thread; i < args.count; i += threads) {
    float value = 0;
    for (uint32_t part = 0; part < args.parts; ++part) value += args.sums[part * args.count + i];
    sum += value * value;
  }
#pragma unroll 8
  for (uint32_t i = thread; i < args.bytes / 16; i += threads)
    sum += float(args.memory[i].x & 0xff);
  for (uint32_t distance = 16; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) warp_sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float all = 0;
    for (uint32_t i = 0; i < blockDim.x / 32; ++i) all += warp_sums[i];
    block_sum = all;
  }
  cluster.sync();
  float total = 0;
  for (uint32_t i = 0; i < cluster.num_blocks(); ++i)
    total += *cluster.map_shared_rank(&block_sum, i);
  cluster.sync();
  const uint16_t value = __half_as_ushort(__float2half(rsqrtf(1 + fabsf(total))));
  for (uint32_t i = thread; i < args.out; i += threads) args.activations[i] = value;
}

class Step {
 public:
  explicit Step(uint32_t rows) : rows_(rows), activations_(rows, kFfn) {
    NIBBLE_CUDA(cudaMalloc(&output_, size_t(8) * rows * 262144 * 4));
    NIBBLE_CUDA(cudaMalloc(&kv_, kLayers * kKvBytes));
    NIBBLE_CUDA(cudaMemset(kv_, 1, kLayers * kKvBytes));
  }
  ~Step() {
    cudaFree(output_);
    cudaFree(kv_);
  }
  Step(const Step&) = delete;

  // small: with stand-ins for the kernels between the matrices
  void record(cudaStream_t stream, bool small) {
    bytes_ = 0;
    uint32_t sliding = 0, full = 0, more = 0, less = 0, more_values = 0, less_values = 0;
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      if (is_full(layer)) {
        multiply(stream, qk_full_, full);
      } else if (has_more_bits(layer)) {
        multiply(stream, qk_sliding_, more_values, &values_, more_values);
        ++more_values;
      } else {
        multiply(stream, qkv_sliding_, less_values++);
      }
      if (small) {
        const char* kv = kv_ + layer * kKvBytes;
        // Attention in 264 blocks, then what merges its splits.
        between(stream, 264, 1, 256, 16384, is_full(layer) ? kKvBytes / 2 : kKvBytes, kv, 8192);
        between(stream, 32, 1, 256, 16384, 0, kv, is_full(layer) ? 16384 : 8192);
      }
      is_full(layer) ? multiply(stream, o_full_, full++) : multiply(stream, o_sliding_, sliding++);
      if (small) between(stream, 1, 8, 96, kHidden, 0, nullptr, kHidden);
      multiply(stream, gate_up_, layer);
      if (small) between(stream, 11, 8, 256, 2 * kFfn, 0, nullptr, kFfn);
      has_more_bits(layer) ? multiply(stream, down_more_, more++) : multiply(stream, down_, less++);
      if (small) between(stream, 1, 8, 96, kHidden, 0, nullptr, kHidden);
    }
    multiply(stream, head_, 0);
  }

  void measure() {
    report("matrices alone", false);
    if (rows_ == 1) report("with small kernels", true);
  }

 private:
  void report(const char* what, bool small) {
    const double ms =
        bench::time_graph_us([&](cudaStream_t stream) { record(stream, small); }) / 1e3;
    std::printf("| %u rows, %-18s | %.3f ms | %4.0f GB/s | %5.1f steps/s |\n", rows_, what, ms,
                bytes_ / ms / 1e6, 1e3 / ms);
    std::fflush(stdout);
  }

  static constexpr uint32_t kKvBytes = kContext * 4096 * 2 * 2;

  template <class First, class Second = CudaQ6Tiled>
  void multiply(cudaStream_t stream, const Matrix<First>& first, size_t copy,
                const Matrix<Second>* second = nullptr, size_t second_copy = 0) {
    FewRowsArgs args = {};
    args.weights[0] = {first.copies[copy % first.copies.size()], first.rows, 0};
    std::optional<LayoutId> second_id;
    if (second) {
      args.weights[1] = {second->copies[second_copy % second->copies.size()], second->rows,
                         first.rows};
      second_id = layout_id<Second>();
      bytes_ += double(second->bytes());
    }
    args.column_tiles = TileGrid(1, first.columns).column_tiles;
    args.rows = rows_;
    args.activations = activations_.device_values;
    args.means = activations_.device_means;
    args.output = output_;
    args.output_stride = first.rows + args.weights[1].rows;
    const FewRowsLaunch launch =
        choose_few_rows(device_shape(), layout_id<First>(), first.rows, second_id,
                        args.weights[1].rows, first.columns, rows_);
    parts_ = launch.parts;
    launch_few_rows(stream, layout_id<First>(), second_id, args, launch);
    bytes_ += double(first.bytes());
  }

  void between(cudaStream_t stream, uint32_t clusters, uint32_t cluster_blocks, uint32_t threads,
               uint32_t count, uint32_t bytes, const char* memory, uint32_t out) {
    launch_dependent_clusters(
        stream, between_kernel, clusters, cluster_blocks, threads, 0,
        BetweenArgs{output_, parts_, count, reinterpret_cast<const uint4*>(memory), bytes,
                    activations_.device_values, out});
    bytes_ += bytes;
  }

  const uint32_t rows_;
  Activations activations_;
  float* output_;
  char* kv_;
  uint32_t parts_ = 0;
  double bytes_ = 0;

  template <class Layout>
  struct Copies : Matrix<Layout> {
    Copies(size_t count, uint32_t rows, uint32_t columns)
        : Matrix<Layout>(rows, columns, count * TileGrid(rows, columns).tiles() * sizeof(Layout)) {}
  };
  Copies<CudaQ4Tiled> qkv_sliding_{25, 16384, kHidden}, qk_sliding_{25, 12288, kHidden};
  Copies<CudaQ6Tiled> values_{25, 4096, kHidden};
  Copies<CudaQ4Tiled> qk_full_{10, 18432, kHidden};
  Copies<CudaQ4Tiled> o_sliding_{50, kHidden, 8192}, o_full_{10, kHidden, 16384};
  Copies<CudaQ4Tiled> gate_up_{kLayers, 2 * kFfn, kHidden};
  Copies<CudaQ4Tiled> down_{kLayers / 2, kHidden, kFfn};
  Copies<CudaQ6Tiled> down_more_{kLayers / 2, kHidden, kFfn};
  Copies<CudaQ6Tiled> head_{1, 262144, kHidden};
};

constexpr size_t kRotate = size_t(600) << 20;

template <class Layout>
void measure_rows(const Shape& shape, std::initializer_list<uint32_t> all_rows) {
  const Matrix<Layout> matrix(shape.rows, shape.columns, kRotate);
  for (const uint32_t rows : all_rows) measure<Layout>(shape, matrix, rows);
}

}  // namespace

int main(int argc, char** argv) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("no CUDA device: nothing to measure\n");
    return 0;
  }
  std::printf("%s, %d multiprocessors, %d MB L2; 100 %% = %.0f GB/s\n\n", properties.name,
              properties.multiProcessorCount, properties.l2CacheSize >> 20, kPeakGbPerS);
  report.take_path(argc, argv);
  if (argc > 1 && std::strcmp(argv[1], "--step") == 0) {
    for (const uint32_t rows : {1u, 8u, 16u, 32u}) Step(rows).measure();
    return 0;
  }
  std::printf(
      "| matrix | shape | type | rows | us | GB/s | of peak | kernel | error |\n"
      "|---|---|---|---|---|---|---|---|---|\n");
  measure_rows<CudaQ4Tiled>({"gate+up", 43008, 5376}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ4Tiled>({"down", 5376, 21504}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ6Tiled>({"down", 5376, 21504}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ6Tiled>({"head", 262144, 5376}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ4Tiled>({"qkv slide", 16384, 5376}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ4Tiled>({"qk full", 18432, 5376}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ4Tiled>({"o slide", 5376, 8192}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ4Tiled>({"o full", 5376, 16384}, {1, 2, 4, 8, 16, 32});
  measure_rows<CudaQ5Tiled>({"gate+up", 43008, 5376}, {1, 8});
  measure_rows<CudaQ8Tiled>({"gate+up", 43008, 5376}, {1, 8});
  measure_rows<CudaQ4SymmetricTiled>({"gate+up", 43008, 5376}, {1, 8});
  measure_rows<CudaF16Tiled>({"gate+up", 43008, 5376}, {1, 8});
  measure_rows<CudaBf16Tiled>({"gate+up", 43008, 5376}, {1, 8});
  return report.write(properties.name);
}
