// Matrix-vector kernels alone: layout x shape x rows, launch included. Weights rotate through more
// memory than the L2 cache holds; every kernel's result is compared with a double-precision product
// of the same blocks dequantised on the host.
//
//   cuda_linear_bench [--check-only] [--sweep]

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/linear/few_rows.cuh"

namespace {

using namespace nibble;
using namespace nibble::cuda;

constexpr double kPeakGbPerS = 3089;  // reading alone, this card: docs/measurements/decode.md

#define CUDA_CHECK(call)                                                                      \
  do {                                                                                        \
    const cudaError_t error_ = (call);                                                        \
    if (error_ != cudaSuccess) {                                                              \
      std::fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call,                      \
                   cudaGetErrorString(error_));                                               \
      std::exit(1);                                                                           \
    }                                                                                         \
  } while (0)

std::mt19937 random_bits(std::random_device{}());

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

template <class Layout>
__global__ void pack_kernel(const typename Layout::Block* pool, uint32_t pool_blocks, uint32_t rows,
                            uint32_t columns, uint32_t column_tiles, uint64_t tiles,
                            Layout* packed) {
  using Block = typename Layout::Block;
  const uint64_t tile = (uint64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kLanes;
  if (tile >= tiles) return;
  const uint32_t lane = threadIdx.x % kLanes;
  const uint32_t row_blocks = columns / Block::kValues;
  const Block* sources[2];
  for (uint32_t half = 0; half < 2; ++half) {
    const uint64_t row = tile / column_tiles * kTileRows + lane / 4 + 8 * half;
    const uint64_t block = row * row_blocks + tile % column_tiles * kTileColumns / Block::kValues;
    sources[half] = row < rows ? pool + block % pool_blocks : nullptr;
  }
  packed[tile].pack_lane(lane, sources, kTileColumns);
}

// A matrix whose blocks repeat a pool of random ones.
template <class Layout>
struct Matrix {
  using Block = typename Layout::Block;
  uint32_t rows, columns;
  std::vector<Block> pool;
  std::vector<Layout*> copies;  // on the device, different addresses, same contents

  Matrix(uint32_t rows, uint32_t columns, size_t total_bytes) : rows(rows), columns(columns) {
    // A row's tile takes consecutive blocks, so the pool is whole tiles and repeats out of step
    // with the rows.
    const uint32_t tile_blocks = kTileColumns / Block::kValues;
    pool.resize(size_t(4099) * tile_blocks);
    for (Block& block : pool) {
      for (size_t i = 0; i < sizeof block; ++i)
        reinterpret_cast<uint8_t*>(&block)[i] = uint8_t(random_bits());
      set_scales(block);
    }
    Block* device_pool;
    CUDA_CHECK(cudaMalloc(&device_pool, pool.size() * sizeof(Block)));
    CUDA_CHECK(cudaMemcpy(device_pool, pool.data(), pool.size() * sizeof(Block),
                          cudaMemcpyHostToDevice));
    const TileGrid grid(rows, columns);
    const size_t count =
        std::max<size_t>(1, (total_bytes + bytes() - 1) / bytes());
    for (size_t i = 0; i < count; ++i) {
      Layout* copy;
      CUDA_CHECK(cudaMalloc(&copy, bytes()));
      pack_kernel<<<uint32_t((grid.tiles() + 3) / 4), 128>>>(
          device_pool, uint32_t(pool.size()), rows, columns, grid.column_tiles, grid.tiles(), copy);
      CUDA_CHECK(cudaGetLastError());
      copies.push_back(copy);
    }
    CUDA_CHECK(cudaDeviceSynchronize());
    CUDA_CHECK(cudaFree(device_pool));
  }
  ~Matrix() {
    for (Layout* copy : copies) cudaFree(copy);
  }
  Matrix(const Matrix&) = delete;

  size_t bytes() const { return TileGrid(rows, columns).tiles() * sizeof(Layout); }

  void row_values(uint32_t row, std::vector<float>& values) const {
    const uint32_t row_blocks = columns / Block::kValues;
    for (uint32_t i = 0; i < row_blocks; ++i) {
      dequantize(pool[(uint64_t(row) * row_blocks + i) % pool.size()],
                 values.data() + size_t(i) * Block::kValues);
    }
  }
};

struct Activations {
  uint32_t rows, columns;
  std::vector<float> values;  // [rows, columns], already rounded to f16
  uint16_t* device_values;
  ActivationMeans* device_means;

  Activations(uint32_t rows, uint32_t columns) : rows(rows), columns(columns) {
    const uint32_t column_tiles = columns / kTileColumns;
    std::vector<uint16_t> packed(size_t(rows) * columns);
    std::vector<ActivationMeans> means(size_t(rows) * column_tiles);
    std::normal_distribution<float> normal;
    values.resize(packed.size());
    for (uint32_t row = 0; row < rows; ++row) {
      for (uint32_t group = 0; group < columns / 32; ++group) {
        double sum = 0;
        for (uint32_t column = 32 * group; column < 32 * group + 32; ++column) {
          const uint16_t bits = f32_to_f16(normal(random_bits));
          packed[activation_index(row, column, rows)] = bits;
          sum += values[size_t(row) * columns + column] = f16_to_f32(bits);
        }
        const float mean = float(sum / 32);
        auto& parts = means[size_t(group / 8) * rows + row].parts[group % 8 / 2];
        parts[0][group % 2] = f32_to_f16(mean);
        parts[1][group % 2] = f32_to_f16(mean - f16_to_f32(parts[0][group % 2]));
      }
    }
    CUDA_CHECK(cudaMalloc(&device_values, packed.size() * 2));
    CUDA_CHECK(cudaMemcpy(device_values, packed.data(), packed.size() * 2, cudaMemcpyHostToDevice));
    CUDA_CHECK(cudaMalloc(&device_means, means.size() * sizeof means[0]));
    CUDA_CHECK(cudaMemcpy(device_means, means.data(), means.size() * sizeof means[0],
                          cudaMemcpyHostToDevice));
  }
  ~Activations() {
    cudaFree(device_values);
    cudaFree(device_means);
  }
  Activations(const Activations&) = delete;
};

int multiprocessors() {
  int count;
  CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

// Launches with or without programmatic dependent launch.
template <class First, class Second, int kWarps, int kStages>
bool launch(cudaStream_t stream, FewRowsArgs args, uint32_t slots, bool dependent) {
  constexpr size_t kLargest = std::max(sizeof(First), sizeof(Second));
  const FewRowsShared shared(kWarps * kStages * kLargest, kWarps, kStages, args.column_tiles,
                             args.rows);
  const auto kernel = few_rows_kernel<First, Second, kWarps, kStages>;
  // One block a multiprocessor must not share it with the next kernel's: blocks would pile up.
  const uint32_t bytes = slots == 1 ? std::max(shared.bytes, 116u << 10) : shared.bytes;
  if (bytes > (slots == 1 ? 227u << 10 : 113u << 10)) return false;
  CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  int(bytes)));
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  const uint32_t row_tiles = (args.weights[0].rows + kTileRows - 1) / kTileRows;
  config.gridDim = std::min<uint32_t>(slots * multiprocessors(), row_tiles);
  args.first_layout_blocks = config.gridDim.x;
  if constexpr (!std::is_same_v<Second, NoLayout>) {
    const double first = double(args.weights[0].rows) * sizeof(First);
    const double second = double(args.weights[1].rows) * sizeof(Second);
    args.first_layout_blocks = uint32_t(std::lround(config.gridDim.x * first / (first + second)));
  }
  config.blockDim = kWarps * kLanes;
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = dependent ? 1 : 0;
  CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, args));
  return true;
}

// Median microseconds of one launch in a graph of `launches`.
template <class Record>
double time_graph(int launches, Record record) {
  cudaStream_t stream;
  CUDA_CHECK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  for (int i = 0; i < launches; ++i) record(stream, i);
  CUDA_CHECK(cudaStreamEndCapture(stream, &graph));
  CUDA_CHECK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  CUDA_CHECK(cudaEventCreate(&start));
  CUDA_CHECK(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < 13; ++i) {
    CUDA_CHECK(cudaEventRecord(start, stream));
    CUDA_CHECK(cudaGraphLaunch(executable, stream));
    CUDA_CHECK(cudaEventRecord(stop, stream));
    CUDA_CHECK(cudaEventSynchronize(stop));
    float ms;
    CUDA_CHECK(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  CUDA_CHECK(cudaGraphExecDestroy(executable));
  CUDA_CHECK(cudaGraphDestroy(graph));
  CUDA_CHECK(cudaStreamDestroy(stream));
  return times[times.size() / 2] * 1e3 / launches;
}

// |output - expected| / |expected| over sampled rows, in double.
template <class Layout>
double relative_error(const Matrix<Layout>& matrix, const Activations& activations,
                      const std::vector<float>& output) {
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
      const double actual =
          double(output[at]) + output[size_t(activations.rows) * matrix.rows + at];
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

template <class Layout, int kWarps, int kStages>
void measure(const Shape& shape, const Matrix<Layout>& matrix, uint32_t rows, uint32_t slots,
             uint32_t prefetch_tiles) {
  const Activations activations(rows, matrix.columns);
  float* output;
  const size_t outputs = size_t(2) * rows * matrix.rows;
  CUDA_CHECK(cudaMalloc(&output, outputs * 4));
  CUDA_CHECK(cudaMemset(output, 0xff, outputs * 4));  // NaN where nothing is written
  FewRowsArgs args = {};
  args.weights[0] = {matrix.copies[0], matrix.rows, 0};
  args.column_tiles = matrix.columns / kTileColumns;
  args.rows = rows;
  args.prefetch_tiles = prefetch_tiles;
  args.activations = activations.device_values;
  args.means = activations.device_means;
  args.output = output;
  args.output_stride = matrix.rows;

  const std::string type(sizeof(Layout) == sizeof(CudaQ6Tiled) ? "Q6_K" : sizeof(Layout) == sizeof(CudaQ4Tiled) ? "Q4_K/Q4_0" : "other");
  if (!launch<Layout, NoLayout, kWarps, kStages>(nullptr, args, slots, false)) {
    CUDA_CHECK(cudaFree(output));
    return;
  }
  CUDA_CHECK(cudaDeviceSynchronize());
  std::vector<float> result(outputs);
  CUDA_CHECK(cudaMemcpy(result.data(), output, outputs * 4, cudaMemcpyDeviceToHost));
  const double error = relative_error(matrix, activations, result);

  const int launches = std::max<int>(24, 2 * int(matrix.copies.size()));
  const double us = time_graph(launches, [&](cudaStream_t stream, int i) {
    args.weights[0].tiles = matrix.copies[i % matrix.copies.size()];
    launch<Layout, NoLayout, kWarps, kStages>(stream, args, slots, true);
  });
  // Bytes that must move: weights, activations once, both parts of the result.
  const double bytes =
      double(matrix.bytes()) + double(rows) * (matrix.columns * 2 + matrix.rows * 8);
  std::printf("%-9s %-9s rows %u  %2dx%d x%u +%u  %8.2f us %5.0f GB/s %5.1f %%  error %.1e%s\n",
              shape.name, type.c_str(), rows, kWarps, kStages, slots, prefetch_tiles, us,
              bytes / us / 1e3, bytes / us / 10 / kPeakGbPerS, error,
              error < 1e-3 ? "" : "  WRONG");
  std::fflush(stdout);
  CUDA_CHECK(cudaFree(output));
}

constexpr size_t kRotate = size_t(600) << 20;

template <class Layout>
void sweep(const Shape& shape) {
  const Matrix<Layout> matrix(shape.rows, shape.columns, kRotate);
  for (const uint32_t prefetch : {0, 1, 2, 3}) {
    measure<Layout, 8, 2>(shape, matrix, 1, 2, prefetch);
    measure<Layout, 8, 3>(shape, matrix, 1, 2, prefetch);
    measure<Layout, 16, 2>(shape, matrix, 1, 1, prefetch);
    measure<Layout, 16, 3>(shape, matrix, 1, 1, prefetch);
    measure<Layout, 12, 2>(shape, matrix, 1, 1, prefetch);
    measure<Layout, 12, 3>(shape, matrix, 1, 1, prefetch);
  }
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("no CUDA device: nothing to measure\n");
    return 0;
  }
  std::printf("device: %s, %d multiprocessors, %d MB L2; 100 %% = %.0f GB/s\n", properties.name,
              properties.multiProcessorCount, properties.l2CacheSize >> 20, kPeakGbPerS);
  sweep<CudaQ4Tiled>({"gate+up", 43008, 5376});
  sweep<CudaQ4Tiled>({"down", 5376, 21504});
  sweep<CudaQ6Tiled>({"down", 5376, 21504});
  sweep<CudaQ6Tiled>({"head", 262144, 5376});
  sweep<CudaQ4Tiled>({"qkv slide", 16384, 5376});
  sweep<CudaQ4Tiled>({"qk full", 18432, 5376});
  sweep<CudaQ4Tiled>({"o slide", 5376, 8192});
  sweep<CudaQ4Tiled>({"o full", 5376, 16384});
  {
    const Shape shape{"gate+up", 43008, 5376};
    const Matrix<CudaQ4Tiled> matrix(43008, 5376, kRotate);
    for (const uint32_t rows : {1, 2, 3, 4, 8}) measure<CudaQ4Tiled, 16, 2>(shape, matrix, rows, 1, 2);
  }
  const auto check = [&]<class Layout>(Layout*, const char* name) {
    const Shape shape{name, 5000, 2048};
    const Matrix<Layout> matrix(5000, 2048, 1);
    for (const uint32_t rows : {1, 5, 8}) measure<Layout, 4, 3>(shape, matrix, rows, 1, 0);
  };
  check(static_cast<CudaQ5Tiled*>(nullptr), "Q5_K");
  check(static_cast<CudaQ8Tiled*>(nullptr), "Q8_0");
  check(static_cast<CudaQ4SymmetricTiled*>(nullptr), "Q4_0");
  check(static_cast<CudaF16Tiled*>(nullptr), "F16");
  check(static_cast<CudaBf16Tiled*>(nullptr), "BF16");
  return 0;
}
