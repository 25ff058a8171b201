// Attention as a step starts it: layers of the 31B model one after the other in a graph, launches
// included; decode alone and between the matrices that stand around it. Layers have pages of their
// own, more than the L2 cache holds. Results are checked by attention_test.
//
//   cuda_attention_bench [--decode] [--prefill] [--mma]

#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string_view>
#include <vector>

#include "cuda/attention/attention.h"
#include "cuda/device_array.h"
#include "cuda/linear/launch_few_rows.h"
#include "cuda/runtime.h"
#include "timing.h"

namespace {

using namespace nibble;
using namespace nibble::cuda;
using backend::kKvPageTokens;

constexpr double kPeakGbPerS = 3089;  // reading alone, this card: docs/measurements/decode.md
constexpr double kPeakTflops = 790;   // an 8192^3 bf16 product, this card
constexpr size_t kRotateBytes = size_t(400) << 20;
constexpr uint32_t kHidden = 5376;
constexpr uint32_t kWidestSums = 43008;  // of a row: prefill's scratch
MatrixUnit unit;                         // that prefill is measured on

// Numbers in [-2, 2), no two neighbours alike.
__global__ void fill_f16(uint16_t* to, size_t count) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < count;
       i += size_t(gridDim.x) * blockDim.x) {
    uint32_t bits = uint32_t(i) * 2654435761u;
    bits ^= bits >> 15;
    to[i] = __half_as_ushort(__float2half_rn(float(bits * 2246822519u) * 0x1p-30f - 2));
  }
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

// How keys and values are stored.
struct Storage {
  const char* name;
  backend::KvFormat format;
  bool shared;
};

backend::KvLayer kv_layer(const backend::AttentionShape& shape, const Storage& storage) {
  using backend::KvFormat;
  backend::KvLayer layer = {};
  layer.kv_heads = shape.kv_heads;
  if (storage.shared) layer.shared = backend::SharedKvRow{shape.head_dim, shape.head_dim / 4};
  layer.row = {storage.format, storage.shared ? layer.shared->values() : shape.head_dim,
               storage.format == KvFormat::kF16  ? 0u
               : storage.format == KvFormat::kQ8 ? 32u
                                                 : 128u};
  layer.value_offset = storage.shared ? 0 : shape.kv_heads * layer.row.head_bytes();
  return layer;
}

// A layer's attention in a step of `sequences` sequences that are `context` long when it ends, with
// `tokens` rows each; and enough copies of the layer's pages that the L2 cache does not hold them.
class Attention {
 public:
  Attention(const Model& model, const Storage& storage, uint32_t context, uint32_t sequences,
            uint32_t tokens, uint32_t parts)
      : shape_(model.shape),
        cache_(kv_layer(shape_, storage)),
        rows_(sequences * tokens),
        column_tiles_(shape_.query_width() / kTileColumns) {
    const uint32_t visible = model.window ? std::min(model.window + tokens - 1, context) : context;
    const uint32_t pages = visible / kKvPageTokens + 2;
    const uint64_t layer_bytes = sequences * pages * cache_.bytes();
    layers_ = uint32_t(std::max<uint64_t>(2, kRotateBytes / layer_bytes));
    const uint64_t page_bytes = layers_ * cache_.bytes();

    pool_ = DeviceArray<char>(sequences * pages * page_bytes);
    fill_f16<<<1024, 256>>>(reinterpret_cast<uint16_t*>(pool_.data()), pool_.size() / 2);
    const uint32_t stride = context / kKvPageTokens + 1;
    std::vector<uint64_t> table(sequences * stride, 0);
    std::vector<RowPlace> places;
    for (uint32_t s = 0; s < sequences; ++s) {
      for (uint32_t i = 0; i < tokens; ++i) places.push_back({context - tokens + i, s});
      for (uint32_t i = 0; i < stride; ++i)
        table[s * stride + i] =
            reinterpret_cast<uint64_t>(pool_.data()) + (s * pages + i % pages) * page_bytes;
    }
    table_ = DeviceArray<uint64_t>(std::span<const uint64_t>(table));
    places_ = DeviceArray<RowPlace>(std::span<const RowPlace>(places));
    std::vector<float> sums(size_t(parts) * rows_ * sums_width(model));
    for (size_t i = 0; i < sums.size(); ++i) sums[i] = float(i * 7919 % 1024) / 512 - 1;
    sums_ = DeviceArray<float>(std::span<const float>(sums));
    std::vector<float> frequencies(shape_.head_dim / 2);
    for (uint32_t i = 0; i < frequencies.size(); ++i)
      frequencies[i] = model.window || i < shape_.head_dim / 8
                           ? std::pow(1e4f, -2.0f * float(i) / float(shape_.head_dim))
                           : 0.0f;
    frequencies_ = DeviceArray<float>(std::span<const float>(frequencies));
    values_ = DeviceArray<uint16_t>(size_t(rows_) * shape_.query_width());
    means_ = DeviceArray<ActivationMeans>(size_t(rows_) * column_tiles_);
    const DeviceShape device = device_shape();
    split_parts_ = DeviceArray<SplitPart>(most_split_parts(device.multiprocessors));
    NIBBLE_CUDA(cudaMemset(split_parts_.data(), 0xff, split_parts_.size() * sizeof(SplitPart)));
    layer_.kv = kv_rows(cache_, shape_.head_dim);
    launch_ = choose_attention(device, unit, shape_, layer_.kv, rows_, tokens == 1 ? rows_ : 0);
    workspace_ = DeviceArray<char>(attention_workspace_bytes(shape_, launch_));

    layer_.shape = shape_;
    layer_.window = model.window;
    layer_.scale = 1;
    layer_.value_is_key = model.value_is_key;
    layer_.query_norm = layer_.key_norm = layer_.value_norm = {true, 1e-6f, nullptr};
    layer_.inverse_frequencies = frequencies_.data();
    std::vector<SequenceRows> rows;
    for (uint32_t s = 0; s < sequences; ++s) rows.push_back({tokens, context - tokens, s});
    sequences_ = DeviceArray<SequenceRows>(std::span<const SequenceRows>(rows));
    scratch_ = DeviceArray<char>(size_t{rows_} * kWidestSums * sizeof(float));
    args_ = {.places = places_.data(),
             .sequences = sequences_.data(),
             .tables = {table_.data(), stride},
             .sequence_count = sequences,
             .chunks = tokens == 1 ? 0 : sequences,
             .most_pages = pages - 1,
             .sums = sums_.data(),
             .parts = parts,
             .stride = sums_width(model),
             .workspace = workspace_.data(),
             .split_parts = split_parts_.data(),
             .scratch = scratch_.data(),
             .scratch_bytes = scratch_.size(),
             .output = output()};
  }

  static uint32_t sums_width(const Model& model) {
    return model.shape.query_width() + (model.value_is_key ? 1 : 2) * model.shape.kv_width();
  }
  const AttentionLaunch& launch() const { return launch_; }
  uint64_t bytes_per_token() const { return cache_.bytes() / kKvPageTokens; }
  uint32_t layers() const { return layers_; }
  uint32_t sums_size() const { return uint32_t(sums_.size()); }
  ActivationRows output() const {
    return {values_.data(), means_.data(), rows_, column_tiles_, rows_ > cuda::kMostRows};
  }

  void start(cudaStream_t stream, uint32_t i) {
    layer_.kv.key_offset = i % layers_ * cache_.bytes();
    layer_.kv.value_offset = layer_.kv.key_offset + cache_.value_offset;
    launch_attention(stream, layer_, launch_, args_);
  }

 private:
  backend::AttentionShape shape_;
  backend::KvLayer cache_;
  uint32_t rows_, column_tiles_, layers_;
  AttentionLaunch launch_;
  AttentionLayer layer_ = {};
  AttentionArgs args_;
  DeviceArray<char> pool_, workspace_, scratch_;
  DeviceArray<uint64_t> table_;
  DeviceArray<RowPlace> places_;
  DeviceArray<SequenceRows> sequences_;
  DeviceArray<float> sums_, frequencies_;
  DeviceArray<SplitPart> split_parts_;
  DeviceArray<uint16_t> values_;
  DeviceArray<ActivationMeans> means_;
};

// Microseconds that a layer takes, of `launches` or more in a row.
double time_alone(Attention& attention, uint32_t least) {
  const uint32_t layers = attention.layers();
  const uint32_t launches = std::max(layers, least) / layers * layers;
  return bench::time_graph_us([&](cudaStream_t stream) {
           for (uint32_t i = 0; i < launches; ++i) attention.start(stream, i);
         }) /
         launches;
}

void measure_decode(const Model& model, const Storage& storage, uint32_t context, uint32_t rows) {
  const backend::AttentionShape& shape = model.shape;
  const uint32_t visible = model.window ? std::min(model.window, context) : context;
  constexpr uint32_t kMatrices = 12;  // 900 MB
  const Matrices before(Attention::sums_width(model), kHidden, kMatrices);
  const Matrices after(kHidden, shape.query_width(), kMatrices);
  Attention attention(model, storage, context, rows, 1, before.launch(rows).parts);
  const DeviceArray<float> other_sums(attention.sums_size());
  const DeviceArray<float> outputs(size_t(after.launch(rows).parts) * rows * kHidden);
  const DeviceArray<uint16_t> normed_values(size_t(rows) * kHidden);
  const DeviceArray<ActivationMeans> normed_means(size_t(rows) * kHidden / kTileColumns);
  NIBBLE_CUDA(cudaMemset(normed_values.data(), 0, normed_values.size() * 2));
  const ActivationRows normed = {normed_values.data(), normed_means.data(), rows,
                                 kHidden / kTileColumns};

  const double us = time_alone(attention, 24);
  // Its matrices write sums that attention does not read: those here are fit to be attended to.
  const auto time_chain = [&](bool with_attention) {
    return bench::time_graph_us([&](cudaStream_t stream) {
             for (uint32_t i = 0; i < 2 * kMatrices; ++i) {
               before.multiply(stream, i % kMatrices, normed, other_sums.data());
               if (with_attention) attention.start(stream, i);
               after.multiply(stream, i % kMatrices, attention.output(), outputs.data());
             }
           }) /
           (2 * kMatrices);
  };
  const double between_us = time_chain(true) - time_chain(false);
  const double bytes = double(rows) * visible * double(attention.bytes_per_token());
  std::printf(
      "| %-7s | %-10s | %6u | %2u | %8.2f | %5.0f | %5.1f %% | %8.2f | %8.2f | %2u x %u |\n",
      model.name, storage.name, context, rows, us, bytes / us / 1e3, bytes / us / 10 / kPeakGbPerS,
      between_us, bytes / 1e6, attention.launch().splits, attention.launch().decode.warps);
  std::fflush(stdout);
}

void measure_prefill(const Model& model, const Storage& storage, uint32_t context,
                     uint32_t tokens) {
  Attention attention(model, storage, context, 1, tokens, 1);
  const double us = time_alone(attention, 4);
  double keys = 0;  // that the queries see
  for (uint32_t i = 0; i < tokens; ++i)
    keys += model.window ? std::min(model.window, context - i) : context - i;
  const double tflops = keys * model.shape.query_width() * 4 / us / 1e6;
  std::printf("| %-7s | %-10s | %6u | %4u | %9.1f | %5.0f | %5.1f %% |\n", model.name, storage.name,
              context, tokens, us, tflops, tflops * 100 / kPeakTflops);
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  cudaDeviceProp properties;
  if (cudaGetDeviceProperties(&properties, 0) != cudaSuccess) {
    std::printf("no CUDA device: nothing to measure\n");
    return 0;
  }
  const std::vector<std::string_view> options(arguments + 1, arguments + count);
  const auto has = [&](std::string_view option) {
    return std::find(options.begin(), options.end(), option) != options.end();
  };
  const bool all = !has("--decode") && !has("--prefill");
  unit = has("--mma") ? MatrixUnit::kMma : device_matrix_unit();
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  const Model sliding{"sliding", {32, 16, 256}, 1024, false}, full{"full", {32, 4, 512}, 0, true};
  using backend::KvFormat;
  const Storage storages[] = {
      {"f16", KvFormat::kF16, false},     {"q8", KvFormat::kQ8, false},
      {"tq4", KvFormat::kTq4, false},     {"f16 shared", KvFormat::kF16, true},
      {"q8 shared", KvFormat::kQ8, true}, {"tq4 shared", KvFormat::kTq4, true}};

  if (all || has("--decode")) {
    std::printf(
        "\n100 %% = %.0f GB/s\n\n"
        "| layer | cache | context | rows | us | GB/s | of peak | us it adds to its matrices | MB "
        "| splits x warps |\n"
        "|---|---|---|---|---|---|---|---|---|---|\n",
        kPeakGbPerS);
    for (const Storage& storage : storages) {
      for (const uint32_t rows : {1u, 4u, 8u}) {
        for (const uint32_t context : {512u, 8192u})
          if (!storage.shared) measure_decode(sliding, storage, context, rows);
        for (const uint32_t context : {512u, 8192u, 32768u, 130048u})
          if (rows == 1 || context <= 8192) measure_decode(full, storage, context, rows);
      }
    }
  }
  if (all || has("--prefill")) {
    std::printf(
        "\n100 %% = %.0f TFLOP/s\n\n"
        "| layer | cache | context | rows | us | TFLOP/s | of peak |\n"
        "|---|---|---|---|---|---|---|\n",
        kPeakTflops);
    for (const uint32_t tokens : {512u, 2048u}) {
      for (const uint32_t context : {512u, 2048u, 8192u, 32768u, 130048u}) {
        if (context < tokens) continue;
        for (const Storage& storage : storages) {
          if (context <= 8192 && !storage.shared)
            measure_prefill(sliding, storage, context, tokens);
          measure_prefill(full, storage, context, tokens);
        }
      }
    }
  }
  return 0;
}
