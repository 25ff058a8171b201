// Matrix-matrix kernels alone: layout x shape x tokens, launch included, beside cuBLAS on bf16
// weights of the same shape where that library is found at run time. Results are compared with
// double-precision products of the same blocks dequantised on the host, at sampled places.

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/device_array.h"
#include "cuda/elementwise/elementwise.h"
#include "cuda/layouts/pack.h"
#include "cuda/linear/launch_many_rows.h"
#include "timing.h"

namespace {

using namespace nibble;
using namespace nibble::cuda;

std::mt19937 random_bits(std::random_device{}());

// Values that matrices and activations repeat, out of step with their rows.
struct Pool {
  static constexpr uint32_t kSize = 1 << 20;
  std::vector<float> values;
  DeviceArray<float> device;

  Pool() : values(kSize) {
    std::normal_distribution<float> normal;
    for (float& value : values) value = f16_to_f32(f32_to_f16(normal(random_bits)));
    device = DeviceArray<float>(values);
  }
  __host__ __device__ static uint32_t index(uint32_t row, uint32_t column) {
    return (row * 130363u + column) % kSize;
  }
};

__global__ void fill_activations(const float* pool, ActivationBlocks to, uint32_t columns) {
  const uint32_t row = blockIdx.x;
  for (uint32_t column = threadIdx.x; column < to.column_tiles * kTileColumns;
       column += blockDim.x) {
    const float value = column < columns ? pool[Pool::index(row, column)] : 0.0f;
    to.values[activation_block_index(row, column, to.row_groups())] =
        __half_as_ushort(__float2half_rn(value));
  }
}
__global__ void fill_bf16(const float* pool, __nv_bfloat16* to,
                          uint32_t columns) {  // [rows, columns]
  for (uint32_t column = threadIdx.x; column < columns; column += blockDim.x)
    to[uint64_t(blockIdx.x) * columns + column] = pool[Pool::index(blockIdx.x, column)];
}

// The first of `parts` results becomes their sum.
__global__ void add_parts(float* results, uint32_t parts, uint64_t size) {
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < size;
       i += uint64_t(gridDim.x) * blockDim.x) {
    for (uint32_t part = 1; part < parts; ++part) results[i] += results[part * size + i];
  }
}

// Counts values that are not the same but for the order of additions.
__global__ void count_differences(const float* a, const float* b, uint64_t size, float tolerance,
                                  uint32_t* count) {
  for (uint64_t i = blockIdx.x * uint64_t(blockDim.x) + threadIdx.x; i < size;
       i += uint64_t(gridDim.x) * blockDim.x) {
    if (!(fabsf(a[i] - b[i]) <= tolerance)) atomicAdd(count, 1);
  }
}

// What cuBLAS would take for the same product, bf16 in and out.
class Yardstick {
 public:
  Yardstick() {
    for (const char* name : {"libcublas.so.13", "libcublas.so.12", "libcublas.so"}) {
      if ((library_ = dlopen(name, RTLD_NOW | RTLD_LOCAL))) break;
    }
    if (!library_) return;
    const auto create = reinterpret_cast<int (*)(void**)>(dlsym(library_, "cublasCreate_v2"));
    set_stream_ = reinterpret_cast<decltype(set_stream_)>(dlsym(library_, "cublasSetStream_v2"));
    multiply_ = reinterpret_cast<decltype(multiply_)>(dlsym(library_, "cublasGemmEx"));
    if (!create || !set_stream_ || !multiply_ || create(&handle_) != 0) handle_ = nullptr;
  }
  bool found() const { return handle_ != nullptr; }
  // out [tokens, rows] = x [tokens, columns] * w [rows, columns]^T
  void multiply(cudaStream_t stream, const __nv_bfloat16* w, const __nv_bfloat16* x,
                __nv_bfloat16* out, int rows, int columns, int tokens) const {
    constexpr int kTransposed = 1, kAsIs = 0, kBf16 = 14, kF32Sums = 68, kBest = -1;
    const float one = 1, zero = 0;
    set_stream_(handle_, stream);
    multiply_(handle_, kTransposed, kAsIs, rows, tokens, columns, &one, w, kBf16, columns, x, kBf16,
              columns, &zero, out, kBf16, rows, kF32Sums, kBest);
  }

 private:
  void* library_ = nullptr;
  void* handle_ = nullptr;
  int (*set_stream_)(void*, cudaStream_t) = nullptr;
  int (*multiply_)(void*, int, int, int, int, int, const void*, const void*, int, int, const void*,
                   int, int, const void*, void*, int, int, int, int) = nullptr;
};

// Median microseconds of one call among `calls` in a row.
template <class Call>
double time_calls(int calls, const Call& call) {
  const Stream stream;
  return bench::time_us(stream.handle, 5,
                        [&] {
                          for (int i = 0; i < calls; ++i) call(stream.handle);
                        }) /
         calls;
}

// A matrix whose row tiles repeat a few random ones, out of step with its own.
template <class Layout>
struct Matrix {
  using Block = typename Layout::Block;
  static constexpr uint32_t kPoolRows = 37 * kTileRows;
  static constexpr size_t kRotate = size_t(300) << 20;  // beyond the L2 cache
  uint32_t rows, columns;
  std::vector<Block> pool;  // [kPoolRows, columns]
  size_t tiles_each;
  uint32_t copies;
  DeviceArray<Layout> tiles;  // [copies]

  Matrix(uint32_t rows, uint32_t columns)
      : rows(rows),
        columns(columns),
        pool(size_t(kPoolRows) * columns / Block::kValues),
        tiles_each(TileGrid(rows, columns).tiles()),
        copies(uint32_t(1 + kRotate / (tiles_each * sizeof(Layout)))),
        tiles(copies * tiles_each) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    const auto set_half = [&](uint8_t* bytes, float size) {
      const uint16_t bits = f32_to_f16(size * uniform(random_bits));
      bytes[0] = uint8_t(bits), bytes[1] = uint8_t(bits >> 8);
    };
    for (Block& block : pool) {
      for (size_t i = 0; i < sizeof block; ++i)
        reinterpret_cast<uint8_t*>(&block)[i] = uint8_t(random_bits());
      // Scales as trained files have them.
      if constexpr (requires { block.min_scale; }) {
        set_half(block.scale.bytes, 3e-4f);
        set_half(block.min_scale.bytes, 3e-3f);
      } else if constexpr (requires { block.high_bits; }) {
        set_half(block.scale.bytes, 3e-5f);
      } else if constexpr (requires { block.scale; }) {
        set_half(block.scale.bytes, 3e-3f);
      } else {
        const float value = 0.05f * uniform(random_bits);
        const uint16_t bits =
            std::is_same_v<Block, quant::BlockF16> ? f32_to_f16(value) : f32_to_bf16(value);
        block.bytes[0] = uint8_t(bits), block.bytes[1] = uint8_t(bits >> 8);
      }
    }
    const DeviceArray<Block> blocks(pool);
    for (uint32_t row = 0; row < rows; row += kPoolRows) {
      pack_on_device(nullptr, layout_id<Layout>(), blocks.data(), std::min(rows - row, kPoolRows),
                     columns, row / kTileRows, tiles.data());
    }
    for (uint32_t i = 1; i < copies; ++i) {
      NIBBLE_CUDA(cudaMemcpyAsync(copy(i), tiles.data(), tiles_each * sizeof(Layout),
                                  cudaMemcpyDeviceToDevice));
    }
    NIBBLE_CUDA(cudaDeviceSynchronize());
  }
  Layout* copy(size_t i) const { return tiles.data() + i % copies * tiles_each; }
  void row_values(uint32_t row, std::vector<float>& values) const {
    const uint32_t row_blocks = columns / Block::kValues;
    for (uint32_t i = 0; i < row_blocks; ++i) {
      dequantize(pool[size_t(row % kPoolRows) * row_blocks + i],
                 values.data() + size_t(i) * Block::kValues);
    }
  }
};

// |output - expected| / |expected| over sampled rows and tokens, in double.
template <class Layout>
double relative_error(const Matrix<Layout>& matrix, const Pool& pool,
                      const DeviceArray<float>& output, uint32_t tokens) {
  std::vector<float> weights(matrix.columns), values(matrix.rows);
  double difference = 0, magnitude = 0;
  for (uint32_t i = 0; i < 24; ++i) {
    const uint32_t token = i < 8    ? i % tokens
                           : i < 16 ? tokens - 1 - i % tokens % 8
                                    : random_bits() % tokens;
    NIBBLE_CUDA(cudaMemcpy(values.data(), output.data() + size_t(token) * matrix.rows,
                           values.size() * 4, cudaMemcpyDeviceToHost));
    for (uint32_t j = 0; j < 24; ++j) {
      const uint32_t row = j < 4 ? j : j < 8 ? matrix.rows - 1 - j : random_bits() % matrix.rows;
      matrix.row_values(row, weights);
      double expected = 0;
      for (uint32_t k = 0; k < matrix.columns; ++k)
        expected += double(weights[k]) * pool.values[Pool::index(token, k)];
      difference += (values[row] - expected) * (values[row] - expected);
      magnitude += expected * expected;
    }
  }
  return std::sqrt(difference / magnitude);
}

struct Bench {
  Pool pool;
  Yardstick yardstick;
  DeviceShape device = device_shape();
  MatrixUnit unit = device_matrix_unit();

  std::string only_name;       // of the matrix; empty: all
  uint32_t only_tokens = 0;    // 0: all
  bool tune = false;           // all candidates, not the chosen one, each with the sum of its parts
  std::FILE* table = nullptr;  // measured_choices.inc, while tuning

  template <class Layout>
  void measure(const char* name, uint32_t rows, uint32_t columns,
               std::initializer_list<uint32_t> all_tokens, bool compare) {
    if (!only_name.empty() && only_name != name) return;
    const Matrix<Layout> matrix(rows, columns);
    DeviceArray<__nv_bfloat16> plain(compare ? size_t(rows) * columns : 0);
    if (compare) fill_bf16<<<rows, 256>>>(pool.device.data(), plain.data(), columns);
    for (const uint32_t tokens : all_tokens) {
      if (only_tokens != 0 && tokens != only_tokens) continue;
      ActivationBlocks activations = {nullptr, tokens, TileGrid(1, columns).column_tiles};
      const DeviceArray<uint16_t> values(activations.size());
      activations.values = values.data();
      fill_activations<<<tokens, 256>>>(pool.device.data(), activations, columns);
      const double flop = 2.0 * rows * columns * tokens;
      const int calls = std::clamp(int(4e13 / flop), 5, 40);
      double theirs = 0;
      if (compare && yardstick.found()) {
        DeviceArray<__nv_bfloat16> x(size_t(tokens) * columns), out(size_t(tokens) * rows);
        fill_bf16<<<tokens, 256>>>(pool.device.data(), x.data(), columns);
        NIBBLE_CUDA(cudaDeviceSynchronize());
        theirs = time_calls(calls, [&](cudaStream_t stream) {
          yardstick.multiply(stream, plain.data(), x.data(), out.data(), int(rows), int(columns),
                             int(tokens));
        });
      }
      std::vector<ManyRowsLaunch> launches = {
          choose_many_rows(device, unit, layout_id<Layout>(), rows, columns, tokens, true)};
      if (tune) {
        launches = many_rows_candidates(device, unit, layout_id<Layout>(), rows, columns, tokens);
      }
      double best_us = 0;
      const ManyRowsLaunch* best = nullptr;
      for (const ManyRowsLaunch& launch : launches) {
        const auto [us, error, differences] = measure_launch(matrix, activations, launch, calls);
        if (!best || us < best_us) best = &launch, best_us = us;
        std::printf(
            "| %-8s | %6u x %-5u | %-4s | %4u | %8.1f | %5.0f | %5.0f | %8.1f | %5.0f | %5.1f %% "
            "| %u x %u, %u chunks, %u+%u tiles | %.1e%s | %u |\n",
            name, rows, columns, std::string(quant::quant_traits(Layout::kSource).name).c_str(),
            tokens, us, flop / us / 1e6, double(tiles_bytes(matrix)) / us / 1e3, theirs,
            theirs > 0 ? flop / theirs / 1e6 : 0.0, 100 * theirs / us, launch.tile_rows,
            launch.tile_tokens, launch.column_chunks, launch.whole_tiles,
            launch.tiles() - launch.whole_tiles, error, error < 1e-3 ? "" : " WRONG", differences);
        std::fflush(stdout);
      }
      if (table) {
        std::fprintf(table, "{%u, LayoutId(%u), %u, %u, %u},  // %s, %s: %.1f us\n",
                     device.multiprocessors, uint32_t(layout_id<Layout>()), rows, columns,
                     best->column_chunks, name,
                     std::string(quant::quant_traits(Layout::kSource).name).c_str(), best_us);
      }
    }
  }
  struct Measured {
    double us, error;
    uint32_t differences;  // from the kernel for other devices
  };
  template <class Layout>
  Measured measure_launch(const Matrix<Layout>& matrix, const ActivationBlocks& activations,
                          const ManyRowsLaunch& launch, int calls) const {
    const uint64_t size = uint64_t(activations.rows) * matrix.rows;
    const DeviceArray<float> output(launch.column_chunks * size);
    NIBBLE_CUDA(cudaMemset(output.data(), 0xff, output.size() * 4));
    const DeviceArray<float> sum(tune ? size : 0), ones(std::vector<float>(activations.rows, 1));
    const DeviceArray<std::byte> workspace(many_rows_workspace_bytes(device));
    NIBBLE_CUDA(cudaMemset(workspace.data(), 0, workspace.size()));
    ManyRowsArgs args = {{{matrix.copy(0), matrix.rows, 0}},
                         activations,
                         nullptr,
                         output.data(),
                         matrix.rows,
                         workspace.data()};
    NIBBLE_CUDA(cudaDeviceSynchronize());
    size_t call = 0;
    const double us = time_calls(calls, [&](cudaStream_t stream) {
      args.weights[0].data = matrix.copy(call++);
      launch_many_rows(stream, layout_id<Layout>(), args, launch);
      if (tune) {
        launch_sum(stream, {{output.data(), launch.column_chunks, activations.rows, matrix.rows},
                            ones.data(),
                            matrix.rows,
                            0,
                            sum.data()});
      }
    });
    add_parts<<<1024, 256>>>(output.data(), launch.column_chunks, size);
    const double error = tune ? 0 : relative_error(matrix, pool, output, activations.rows);
    return {us, error, other_unit_differences<Layout>(args, matrix.columns, output)};
  }
  // In how many places the kernel for other devices finds something else. A race would show here.
  template <class Layout>
  uint32_t other_unit_differences(ManyRowsArgs args, uint32_t columns,
                                  const DeviceArray<float>& output) const {
    const uint32_t rows = args.weights[0].rows;
    const ManyRowsLaunch launch = choose_many_rows(device, MatrixUnit::kMma, layout_id<Layout>(),
                                                   rows, columns, args.activations.rows, false);
    const uint64_t size = uint64_t(args.activations.rows) * rows;
    const DeviceArray<float> other(size);
    DeviceArray<uint32_t> count(1);
    NIBBLE_CUDA(cudaMemset(other.data(), 0xff, other.size() * 4));
    NIBBLE_CUDA(cudaMemset(count.data(), 0, 4));
    args.output = other.data();
    launch_many_rows(nullptr, layout_id<Layout>(), args, launch);
    // Sums of `columns` products of about 0.05 each, with f32's rounding.
    const float tolerance = 0.3f * std::sqrt(float(columns)) * float(columns) * std::exp2(-24.0f);
    count_differences<<<1024, 256>>>(output.data(), other.data(), size, tolerance, count.data());
    NIBBLE_CUDA(cudaDeviceSynchronize());
    return count.download()[0];
  }
  template <class Layout>
  static size_t tiles_bytes(const Matrix<Layout>& matrix) {
    return matrix.tiles_each * sizeof(Layout);
  }
};

}  // namespace

// [--tune [--table FILE]] [matrix [tokens]]: only these; --tune measures all candidates of the
// choice, and writes the best ones' table (src/cuda/linear/measured_choices.inc)
int main(int count, char** arguments) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("no CUDA device: nothing to measure\n");
    return 0;
  }
  Bench bench;
  if (count > 1 && std::strcmp(arguments[1], "--tune") == 0) {
    bench.tune = true;
    --count, ++arguments;
    if (count > 2 && std::strcmp(arguments[1], "--table") == 0) {
      bench.table = std::fopen(arguments[2], "w");
      if (!bench.table) return std::perror(arguments[2]), 1;
      std::fprintf(bench.table, "// Measured by cuda_gemm_bench --tune --table on an %s.\n",
                   properties.name);
      count -= 2, arguments += 2;
    }
  }
  if (count > 1) bench.only_name = arguments[1];
  if (count > 2) bench.only_tokens = uint32_t(std::atoi(arguments[2]));
  std::printf("%s, %d multiprocessors; yardstick: %s\n\n", properties.name,
              properties.multiProcessorCount,
              bench.yardstick.found() ? "cuBLAS, bf16" : "cuBLAS not found");
  std::printf(
      "| matrix | shape | type | tokens | us | TFLOP/s | GB/s of weights | cuBLAS us | TFLOP/s "
      "| ours / theirs | tiles | error | differences "
      "|\n|---|---|---|---|---|---|---|---|---|---|---|---|---|\n");
  if (bench.tune) {
    const auto few = {kStreamTokens};
    bench.measure<CudaQ4Tiled>("gate+up", 43008, 5376, few, false);
    bench.measure<CudaQ4Tiled>("down", 5376, 21504, few, false);
    bench.measure<CudaQ6Tiled>("down", 5376, 21504, few, false);
    bench.measure<CudaQ4Tiled>("qkv", 16384, 5376, few, false);
    bench.measure<CudaQ4Tiled>("qk slide", 12288, 5376, few, false);
    bench.measure<CudaQ6Tiled>("v slide", 4096, 5376, few, false);
    bench.measure<CudaQ4Tiled>("qk full", 18432, 5376, few, false);
    bench.measure<CudaQ4Tiled>("o slide", 5376, 8192, few, false);
    bench.measure<CudaQ4Tiled>("o full", 5376, 16384, few, false);
    bench.measure<CudaQ6Tiled>("head", 262144, 5376, few, false);
    if (bench.table) std::fclose(bench.table);
    return 0;
  }
  const auto all = {64u, 128u, 256u, 512u, 1024u, 2048u};
  const auto large = {64u, 512u, 2048u};
  bench.measure<CudaQ4Tiled>("gate+up", 43008, 5376, all, true);
  bench.measure<CudaQ4Tiled>("down", 5376, 21504, all, true);
  bench.measure<CudaQ6Tiled>("down", 5376, 21504, all, true);
  bench.measure<CudaQ4Tiled>("qkv", 16384, 5376, all, true);
  bench.measure<CudaQ4Tiled>("o slide", 5376, 8192, all, true);
  bench.measure<CudaQ4Tiled>("o full", 5376, 16384, {64, 512, 2048}, true);
  bench.measure<CudaQ5Tiled>("qkv", 16384, 5376, large, false);
  bench.measure<CudaQ8Tiled>("qkv", 16384, 5376, large, false);
  bench.measure<CudaQ4SymmetricTiled>("qkv", 16384, 5376, large, false);
  bench.measure<CudaF16Tiled>("qkv", 16384, 5376, large, false);
  bench.measure<CudaBf16Tiled>("qkv", 16384, 5376, large, false);
  bench.measure<CudaQ4Tiled>("ragged", 1000, 768, {9, 77, 333}, false);
  return 0;
}
