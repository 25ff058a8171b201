// Decode attention as a step starts it: layers of the 31B model one after the other in a graph,
// launches included, alone and between the matrices that stand around it. Layers have pages of
// their own, more than the L2 cache holds. Results are checked by attention_test.

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <vector>

#include "cuda/attention/attention.h"
#include "cuda/device_array.h"
#include "cuda/linear/launch_few_rows.h"
#include "cuda/runtime.h"

namespace {

using namespace nibble;
using namespace nibble::cuda;
using backend::kKvPageTokens;

constexpr double kPeakGbPerS = 3089;  // reading alone, this card: docs/measurements/decode.md
constexpr size_t kRotateBytes = size_t(400) << 20;
constexpr uint32_t kHidden = 5376;

// Numbers in [-2, 2), no two neighbours alike.
__global__ void fill_f16(uint16_t* to, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    uint32_t bits = uint32_t(i) * 2654435761u;
    bits ^= bits >> 15;
    to[i] = __half_as_ushort(__float2half_rn(float(bits * 2246822519u) * 0x1p-30f - 2));
  }
}

DeviceShape device_shape() {
  int multiprocessors, shared_bytes;
  NIBBLE_CUDA(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, 0));
  NIBBLE_CUDA(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0));
  return {uint32_t(multiprocessors), uint32_t(shared_bytes)};
}

// Microseconds that what `record` starts takes, median of replays.
template <class Record>
double time_graph(const Record& record) {
  cudaStream_t stream;
  NIBBLE_CUDA(cudaStreamCreate(&stream));
  NIBBLE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  record(stream);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  NIBBLE_CUDA(cudaStreamEndCapture(stream, &graph));
  NIBBLE_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t start, stop;
  NIBBLE_CUDA(cudaEventCreate(&start));
  NIBBLE_CUDA(cudaEventCreate(&stop));
  std::vector<float> times;
  for (int i = 0; i < 13; ++i) {
    NIBBLE_CUDA(cudaEventRecord(start, stream));
    NIBBLE_CUDA(cudaGraphLaunch(executable, stream));
    NIBBLE_CUDA(cudaEventRecord(stop, stream));
    NIBBLE_CUDA(cudaEventSynchronize(stop));
    float ms;
    NIBBLE_CUDA(cudaEventElapsedTime(&ms, start, stop));
    if (i >= 2) times.push_back(ms);
  }
  NIBBLE_CUDA(cudaEventDestroy(start));
  NIBBLE_CUDA(cudaEventDestroy(stop));
  NIBBLE_CUDA(cudaGraphExecDestroy(executable));
  NIBBLE_CUDA(cudaGraphDestroy(graph));
  NIBBLE_CUDA(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e3;
}

// Matrices of 4 bits whose numbers mean nothing.
class Matrices {
 public:
  Matrices(uint32_t rows, uint32_t columns, uint32_t count)
      : rows_(rows),
        columns_(columns),
        bytes_(TileGrid(rows, columns).tiles() * sizeof(CudaQ4Tiled)),
        tiles_(count * bytes_) {
    NIBBLE_CUDA(cudaMemset(tiles_.data(), 1, tiles_.size()));
  }

  FewRowsLaunch launch(uint32_t rows) const {
    return choose_few_rows(device_shape(), LayoutId::kQ4, rows_, {}, 0, columns_, rows);
  }
  void multiply(cudaStream_t stream, uint32_t index, const ActivationRows& input,
                float* output) const {
    FewRowsArgs args = {};
    args.weights[0] = {tiles_.data() + index * bytes_, rows_, 0};
    args.column_tiles = input.column_tiles;
    args.rows = input.rows;
    args.activations = input.values;
    args.means = input.means;
    args.output = output;
    args.output_stride = rows_;
    launch_few_rows(stream, LayoutId::kQ4, {}, args, launch(input.rows));
  }

 private:
  uint32_t rows_, columns_;
  size_t bytes_;
  DeviceArray<char> tiles_;
};

struct Model {
  const char* name;
  backend::AttentionShape shape;
  uint32_t window;
  bool value_is_key;
};

void measure(const Model& model, uint32_t context, uint32_t rows) {
  const uint32_t multiprocessors = device_shape().multiprocessors;
  const backend::AttentionShape& shape = model.shape;
  const uint32_t visible = model.window ? std::min(model.window, context) : context;
  const uint32_t pages = visible / kKvPageTokens + 2;
  const uint64_t half_page = uint64_t(shape.kv_width()) * kKvPageTokens * 2;
  const uint64_t layer_bytes = rows * pages * 2 * half_page;
  const uint32_t layers = uint32_t(std::max<uint64_t>(2, kRotateBytes / layer_bytes));
  const uint64_t page_bytes = layers * 2 * half_page;

  const DeviceArray<char> pool(rows * pages * page_bytes);
  fill_f16<<<1024, 256>>>(reinterpret_cast<uint16_t*>(pool.data()), pool.size() / 2);
  const uint32_t stride = context / kKvPageTokens + 1;
  std::vector<uint64_t> table(rows * stride, 0);
  std::vector<RowPlace> places;
  for (uint32_t row = 0; row < rows; ++row) {
    places.push_back({context - 1, row});
    for (uint32_t i = 0; i < stride; ++i)
      table[row * stride + i] =
          reinterpret_cast<uint64_t>(pool.data()) + (row * pages + i % pages) * page_bytes;
  }
  const DeviceArray<uint64_t> device_table{std::span<const uint64_t>(table)};
  const DeviceArray<RowPlace> device_places{std::span<const RowPlace>(places)};
  constexpr uint32_t kMatrices = 12;  // 900 MB
  const uint32_t sums_stride =
      shape.query_width() + (model.value_is_key ? 1 : 2) * shape.kv_width();
  const Matrices before(sums_stride, kHidden, kMatrices);
  const Matrices after(kHidden, shape.query_width(), kMatrices);
  const uint32_t parts = before.launch(rows).parts();
  std::vector<float> host_sums(parts * rows * sums_stride);
  for (size_t i = 0; i < host_sums.size(); ++i) host_sums[i] = float(i * 7919 % 1024) / 512 - 1;
  const DeviceArray<float> sums{std::span<const float>(host_sums)};
  const DeviceArray<float> other_sums(host_sums.size());
  const DeviceArray<float> outputs(size_t(after.launch(rows).parts()) * rows * kHidden);
  std::vector<float> host_frequencies(shape.head_dim / 2);
  for (uint32_t i = 0; i < host_frequencies.size(); ++i)
    host_frequencies[i] = model.window || i < shape.head_dim / 8
                              ? std::pow(1e4f, -2.0f * float(i) / float(shape.head_dim))
                              : 0.0f;
  const DeviceArray<float> frequencies{std::span<const float>(host_frequencies)};
  const AttentionLaunch launch = choose_attention(multiprocessors, shape, rows, rows);
  const DeviceArray<SplitPart> split_parts(most_split_parts(multiprocessors));
  NIBBLE_CUDA(cudaMemset(split_parts.data(), 0xff, split_parts.size() * sizeof(SplitPart)));
  const uint32_t column_tiles = shape.query_width() / kTileColumns;
  const DeviceArray<uint16_t> values(size_t(rows) * shape.query_width());
  const DeviceArray<ActivationMeans> means(size_t(rows) * column_tiles);
  const ActivationRows attended = {values.data(), means.data(), rows, column_tiles};
  const DeviceArray<uint16_t> normed_values(size_t(rows) * kHidden);
  const DeviceArray<ActivationMeans> normed_means(size_t(rows) * kHidden / kTileColumns);
  NIBBLE_CUDA(cudaMemset(normed_values.data(), 0, normed_values.size() * 2));
  const ActivationRows normed = {normed_values.data(), normed_means.data(), rows,
                                 kHidden / kTileColumns};

  AttentionLayer layer = {};
  layer.shape = shape;
  layer.window = model.window;
  layer.scale = 1;
  layer.value_is_key = model.value_is_key;
  layer.query_norm = layer.key_norm = layer.value_norm = {true, 1e-6f, nullptr};
  layer.inverse_frequencies = frequencies.data();
  layer.format = backend::KvFormat::kF16;
  const AttentionArgs args = {device_places.data(), {device_table.data(), stride},
                              sums.data(),          parts,
                              sums_stride,          nullptr,
                              split_parts.data(),   attended};

  const auto attend = [&](cudaStream_t stream, uint32_t i) {
    layer.key_offset = i % layers * 2 * half_page;
    layer.value_offset = layer.key_offset + half_page;
    launch_attention(stream, layer, launch, args);
  };
  const uint32_t launches = std::max(layers, 24u) / layers * layers;
  const double us = time_graph([&](cudaStream_t stream) {
                      for (uint32_t i = 0; i < launches; ++i) attend(stream, i);
                    }) /
                    launches;
  // Its matrices write sums that attention does not read: those here are fit to be attended to.
  const auto time_chain = [&](bool with_attention) {
    return time_graph([&](cudaStream_t stream) {
             for (uint32_t i = 0; i < 2 * kMatrices; ++i) {
               before.multiply(stream, i % kMatrices, normed, other_sums.data());
               if (with_attention) attend(stream, i);
               after.multiply(stream, i % kMatrices, attended, outputs.data());
             }
           }) /
           (2 * kMatrices);
  };
  const double between_us = time_chain(true) - time_chain(false);
  const double bytes = double(rows) * visible * shape.kv_width() * 4;  // keys and values in f16
  std::printf("| %-7s | %6u | %2u | %8.2f | %5.0f | %5.1f %% | %8.2f | %8.2f | %2u |\n", model.name,
              context, rows, us, bytes / us / 1e3, bytes / us / 10 / kPeakGbPerS, between_us,
              bytes / 1e6, launch.splits);
  std::fflush(stdout);
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("no CUDA device: nothing to measure\n");
    return 0;
  }
  std::printf("%s, %d multiprocessors; 100 %% = %.0f GB/s\n\n", properties.name,
              properties.multiProcessorCount, kPeakGbPerS);
  std::printf(
      "| layer | context | rows | us | GB/s | of peak | us it adds to its matrices | MB | splits "
      "|\n"
      "|---|---|---|---|---|---|---|---|---|\n");
  const Model sliding{"sliding", {32, 16, 256}, 1024, false}, full{"full", {32, 4, 512}, 0, true};
  for (const uint32_t rows : {1u, 4u, 8u}) {
    for (const uint32_t context : {512u, 8192u}) measure(sliding, context, rows);
    for (const uint32_t context : {512u, 8192u, 32768u, 130048u})
      if (rows == 1 || context <= 8192) measure(full, context, rows);
  }
  return 0;
}
