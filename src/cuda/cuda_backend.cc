#include "cuda/cuda_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <optional>
#include <utility>
#include <variant>
#include <vector>

#include "base/checked_math.h"
#include "base/error.h"
#include "cuda/attention/attention.h"
#include "cuda/device_turn.h"
#include "cuda/elementwise/elementwise.h"
#include "cuda/handles.h"
#include "cuda/layouts/pack.h"
#include "cuda/linear/launch_few_rows.h"
#include "cuda/linear/launch_many_rows.h"
#include "cuda/matrix_rate.h"
#include "cuda/memory/device_kv_store.h"
#include "cuda/memory/device_weights.h"
#include "cuda/memory/read_bandwidth.h"
#include "cuda/profiler.h"
#include "cuda/step_inputs.h"

namespace nibble::cuda {
namespace {

using namespace backend;

// Decode steps of up to so many rows are captured: more take so long that starting their kernels
// one by one costs nothing.
constexpr uint32_t kMostGraphRows = 64;
constexpr size_t kMostGraphs = 64;
// Of rows beyond these, many_rows.h is faster: of the head because its logits would come in parts,
// of all matrices with Hopper's instructions (docs/measurements/batches.md).
constexpr uint32_t kMostFewRows = 16;
constexpr uint32_t kMostHeadRows = 64;  // logits take a megabyte a row

// By how much a gated MLP's values are divided more when f16 could not hold them, and when to stop:
// then f16 holds the largest f32.
constexpr float kGatedScaleStep = 64, kLargestGatedScale = 0x1p114f;

// What a kernel of a matrix is started with, but for its activations.
struct LinearCall {
  const MatrixPart* part;
  FewRowsArgs args;
  FewRowsLaunch launch;
};

// The result of a linear, and what it must still be multiplied by.
struct Product {
  Sums sums;
  const float* scales;  // [rows]
};

class CudaBackend final : public Backend {
 public:
  CudaBackend(const Plan& plan, const BackendOptions& options, const Progress& progress);

  std::string description() const override;
  KvStore& kv() override { return kv_; }
  MemoryUse memory() const override;
  void run(const Batch& batch, BatchResult& result) override;
  double read_bandwidth() override {
    use_device();
    return measure_read_bandwidth(stream_.handle, weights_.memory());
  }
  double matrix_rate() override {
    use_device();
    return measure_matrix_rate(stream_.handle);
  }
  void set_profiling(bool on) override { profiler_.set(on); }
  std::vector<ProfileEntry> profile() override { return profiler_.entries(); }

 private:
  // Of CUDA's calls many go to the thread's current device, which another backend may have changed.
  void use_device() const { NIBBLE_CUDA(cudaSetDevice(int(options_.device))); }
  void add_norm(const RmsNorm& norm);
  void add_attention(const NormQkvStep& qkv, const AttendStep& attend);
  void reserve_workspace();
  void grow_attention_workspace();

  // Starts the kernels of the whole step.
  void launch_step(const Batch* batch, BatchResult* result);
  void run_graph();
  // After a step: whether values were too large for a gated MLP's scale, which is larger now.
  bool raise_gated_scales();
  void observe(const Batch& batch, size_t step, ValueId value);

  // Each returns the value it wrote, where it is one that exists: queries and what attention makes
  // of them live in the layouts of the kernels alone.
  std::optional<ValueId> run_step(const EmbedStep& step, size_t index);
  std::optional<ValueId> run_step(const NormQkvStep& step, size_t index);
  std::optional<ValueId> run_step(const AttendStep&, size_t) { return {}; }  // done by NormQkvStep
  std::optional<ValueId> run_step(const ProjectStep& step, size_t index);
  std::optional<ValueId> run_step(const GatedMlpStep& step, size_t index);
  std::optional<ValueId> run_step(const LogitsStep&, size_t) { return {}; }  // run_head()
  void run_head(const LogitsStep& step, BatchResult* result);

  // The rows' product with a weight: parts as they are for few rows, else added up.
  Product multiply(std::string_view what, WeightId weight, const ScaledRows& input);
  // Both into sums_. Of rows that are not in blocks:
  Sums multiply_few(WeightId weight, const ActivationRows& input);
  // Of more rows, scaled:
  Sums multiply_many(const DeviceMatrix& matrix, const ScaledRows& input);
  ManyRowsLaunch many_rows_launch(const DeviceMatrix& matrix, LayoutId layout,
                                  const WeightRows& weights, uint32_t rows) const;
  // The matrix as tiles: in tiles_ those parts that are stored as blocks.
  std::vector<MatrixPart> packed_parts(const DeviceMatrix& matrix);
  std::vector<LinearCall> linear_calls(WeightId weight, uint32_t rows) const;
  Product add_up(const Product& product);
  // The residual takes up a product; the norm of the step after `index` comes along.
  void update(const Product& product, const std::optional<RmsNorm>& post_norm, float output_scale,
              size_t index);

  DeviceNorm device_norm(const RmsNorm& norm) const {
    const StoredNorm& stored = norms_.at(&norm);
    return {norm.weight.empty() ? nullptr : stored.weight.data(), norm.epsilon, stored.in_range};
  }
  HeadNorm head_norm(const std::optional<RmsNorm>& norm) const {
    if (!norm) return {};
    return {true, norm->epsilon, device_norm(*norm).weight};
  }
  // The norm that the step after `index` begins with.
  const RmsNorm& next_norm(size_t index) const;
  ScaledRows rows_of(DeviceArray<uint16_t>& values, DeviceArray<ActivationMeans>& means,
                     DeviceArray<float>& scales, uint32_t width, uint32_t rows) {
    return {
        {values.data(), means.data(), rows, TileGrid(1, width).column_tiles, rows > most_few_rows_},
        scales.data()};
  }
  ScaledRows normed(uint32_t rows) {
    return rows_of(normed_values_, normed_means_, normed_scales_, plan_.hidden, rows);
  }
  ScaledRows head_input(uint32_t rows) {
    ScaledRows input = normed(rows);
    input.rows.in_blocks = rows > most_few_head_rows_;
    return input;
  }
  // What the step after `index` begins with.
  ScaledRows next_normed(size_t index) {
    const bool head = std::holds_alternative<LogitsStep>(plan_.steps.at(index + 1));
    return head ? head_input(rows()) : normed(rows());
  }
  ScaledRows inner(uint32_t width, uint32_t rows) {
    return rows_of(inner_values_, inner_means_, inner_scales_, width, rows);
  }
  uint32_t rows() const { return inputs_.shape().rows; }
  AttentionLaunch attention_launch(const AttentionLayer& layer) const {
    return choose_attention(device_shape_, device_matrix_unit(), layer.shape, layer.kv, rows(),
                            inputs_.shape().single_rows);
  }

  // kind: what the profile calls it; bytes: what it must read; flops: of its matrix products
  template <class Launch>
  void timed(std::string_view kind, uint64_t bytes, const Launch& launch, double flops = 0) {
    profiler_.time(stream_.handle, kind, bytes, flops, launch);
  }

  const Plan& plan_;
  const BackendOptions options_;
  const DeviceInfo device_;
  const DeviceShape device_shape_ = device_shape();
  const uint32_t most_few_head_rows_ = std::min(most_few_rows(device_shape_), kMostFewRows);
  const uint32_t most_few_rows_ = device_matrix_unit() == MatrixUnit::kWgmma
                                      ? most_few_head_rows_
                                      : most_few_rows(device_shape_);
  // That are multiplied at a time. The head is too large a matrix to be packed whole in a step.
  const uint32_t most_head_rows_ =
      options_.weights == WeightStorage::kDirect ? kMatrixTokens : kMostHeadRows;
  Stream stream_;
  DeviceWeights weights_;
  DeviceKvStore kv_;
  const std::vector<KvPlace> kv_places_;
  StepInputs inputs_{kv_, most_head_rows_};

  struct StoredNorm {
    DeviceArray<float> weight;
    bool in_range;  // DeviceNorm's
  };
  std::map<const RmsNorm*, StoredNorm> norms_;  // the plan's
  std::map<const Rope*, DeviceArray<float>> ropes_;
  std::map<const NormQkvStep*, AttentionLayer> attention_;

  DeviceArray<float> residual_;  // [ubatch, hidden]
  DeviceArray<float> sums_;      // of the last product: [parts, rows, rows of a weight]
  DeviceArray<float> ones_;      // [ubatch]
  DeviceArray<uint16_t> normed_values_, inner_values_;
  DeviceArray<ActivationMeans> normed_means_, inner_means_;
  DeviceArray<float> normed_scales_, inner_scales_;
  DeviceArray<std::byte> shared_tiles_;  // of matrix-matrix kernels
  // What is packed while a step runs, where weights are blocks, and a byte that is written after.
  DeviceArray<std::byte> tiles_;
  DeviceArray<std::byte> attention_workspace_;
  DeviceArray<SplitPart> split_parts_;
  std::vector<float> gated_scales_;         // [steps of the plan], GatedArgs::gated_scale
  DeviceArray<float> device_gated_scales_;  // the same
  Pinned<uint32_t> gated_overflows_;        // [steps of the plan]
  Pinned<int32_t> sampled_;                 // [ubatch]
  uint64_t workspace_bytes_ = 0;

  std::map<StepShape, Graph> graphs_;
  Profiler profiler_;
};

DeviceInfo select(uint32_t device) {
  if (device >= device_count()) {
    fail(ErrorCode::kInvalidArgument, "CUDA device {} asked for, but there are {}", device,
         device_count());
  }
  NIBBLE_CUDA(cudaSetDevice(int(device)));
  // No kernel calls what is not inlined. For a stack, the driver would hold back 1 KB of memory for
  // each thread that the device has room for: 277 MB on an H100.
  NIBBLE_CUDA(cudaDeviceSetLimit(cudaLimitStackSize, 0));
  const DeviceInfo info = device_info(device);
  if (kernel_architecture() == 0) {
    fail(ErrorCode::kUnsupported,
         "{} has compute capability {}.{}, and this build has no kernels for that; build with "
         "-DNIBBLE_CUDA_ARCHITECTURES={}{} (from 8.0 on), or use --backend cpu",
         info.name, info.major, info.minor, info.major, info.minor);
  }
  return info;
}

constexpr uint64_t kTileAlignment = 256;

uint64_t packed_bytes(const DeviceMatrix& matrix) {
  uint64_t bytes = 0;
  for (const MatrixPart& part : matrix.parts) {
    for (uint32_t i = 0; i < 2 && part.rows[i].rows > 0; ++i)
      bytes +=
          round_up(packed_bytes(part.layout(i), part.rows[i].rows, matrix.columns), kTileAlignment);
  }
  return bytes;
}

// Says what has no kernel before anything is loaded.
const Plan& require_kernels(const Plan& plan) {
  for (const Step& step : plan.steps) {
    if (const auto* qkv = std::get_if<NormQkvStep>(&step)) check_heads(qkv->shape);
  }
  return plan;
}

CudaBackend::CudaBackend(const Plan& plan, const BackendOptions& options, const Progress& progress)
    : plan_(plan),
      options_(options),
      device_(select(options.device)),
      weights_(require_kernels(plan), options.weights, progress),
      kv_(make_kv_groups(plan, options.kv), options.max_kv_pages, options.device, stream_.handle),
      kv_places_(kv_places(plan, kv_.groups())) {
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    if (const auto* qkv = std::get_if<NormQkvStep>(&step)) {
      const auto* attend =
          i + 1 < plan.steps.size() ? std::get_if<AttendStep>(&plan.steps[i + 1]) : nullptr;
      NIBBLE_CHECK(attend && attend->query == qkv->query && attend->cache == qkv->cache);
      add_norm(qkv->norm);
      add_attention(*qkv, *attend);
    } else if (const auto* project = std::get_if<ProjectStep>(&step)) {
      if (project->post_norm) add_norm(*project->post_norm);
    } else if (const auto* mlp = std::get_if<GatedMlpStep>(&step)) {
      NIBBLE_CHECK(mlp->activation == Activation::kGeluTanh);
      add_norm(mlp->norm);
      if (mlp->post_norm) add_norm(*mlp->post_norm);
    } else if (const auto* logits = std::get_if<LogitsStep>(&step)) {
      add_norm(logits->norm);
    }
  }
  reserve_workspace();
}

void CudaBackend::add_norm(const RmsNorm& norm) {
  float largest = norm.weight.empty() ? 1.0f : 0.0f;
  for (const float weight : norm.weight) largest = std::max(largest, std::abs(weight));
  const bool in_range = largest * std::sqrt(float(plan_.hidden)) <= kLargestHalf;
  norms_.emplace(&norm, StoredNorm{DeviceArray<float>(std::span(norm.weight)), in_range});
}

void CudaBackend::add_attention(const NormQkvStep& qkv, const AttendStep& attend) {
  for (const auto* norm : {&qkv.query_norm, &qkv.key_norm, &qkv.value_norm}) {
    if (*norm) add_norm(**norm);
  }
  const auto& rope =
      ropes_.emplace(&qkv.rope, std::span(qkv.rope.inverse_frequencies)).first->second;
  const KvPlace place = kv_places_[qkv.cache.value];
  const KvLayer& layer = kv_.groups()[place.group].layers[place.layer];
  attention_[&qkv] = {.shape = qkv.shape,
                      .window = plan_.cache(qkv.cache).window,
                      .scale = attend.scale,
                      .value_is_key = qkv.value_is_key,
                      .query_norm = head_norm(qkv.query_norm),
                      .key_norm = head_norm(qkv.key_norm),
                      .value_norm = head_norm(qkv.value_norm),
                      .inverse_frequencies = rope.data(),
                      .kv = kv_rows(layer, qkv.shape.head_dim)};
}

void CudaBackend::reserve_workspace() {
  const uint64_t ubatch = options_.ubatch;
  const uint64_t head_rows = std::min<uint64_t>(ubatch, most_head_rows_);
  uint64_t sum_floats = 0, tile_bytes = 0;
  uint32_t inner_width = 0;
  const auto reserve = [&](WeightId id, uint64_t most_rows) {
    const DeviceMatrix& matrix = weights_.matrix(id);
    for (uint32_t rows = 1; rows <= std::min<uint64_t>(most_rows, most_few_rows_); ++rows) {
      for (const LinearCall& call : linear_calls(id, rows))
        sum_floats = std::max(sum_floats, uint64_t(call.launch.parts) * rows * matrix.rows);
    }
    if (most_rows > kMatrixTokens) tile_bytes = std::max(tile_bytes, packed_bytes(matrix));
    // Only products of few tokens come in parts.
    const auto result_floats = [&](uint64_t rows) {
      uint64_t parts = 1;
      for (const MatrixPart& part : matrix.parts) {
        parts = std::max<uint64_t>(
            parts,
            many_rows_launch(matrix, part.first, part.rows[0], uint32_t(rows)).column_chunks);
      }
      return parts * rows * matrix.rows;
    };
    for (uint64_t rows = most_few_head_rows_ + 1;
         rows <= std::min<uint64_t>(most_rows, kStreamTokens); ++rows)
      sum_floats = std::max(sum_floats, result_floats(rows));
    sum_floats = std::max(sum_floats, result_floats(most_rows));
  };
  for (const Step& step : plan_.steps) {
    if (const auto* embed = std::get_if<EmbedStep>(&step)) {
      const DeviceMatrix& table = weights_.matrix(embed->table);
      tile_bytes =
          std::max(tile_bytes, packed_bytes(table.parts[0].first, uint32_t(ubatch), table.columns));
    } else if (const auto* qkv = std::get_if<NormQkvStep>(&step)) {
      reserve(qkv->qkv, ubatch);
      inner_width = std::max(inner_width, qkv->shape.query_width());
    } else if (const auto* project = std::get_if<ProjectStep>(&step)) {
      reserve(project->weight, ubatch);
    } else if (const auto* mlp = std::get_if<GatedMlpStep>(&step)) {
      reserve(mlp->gate_up, ubatch);
      reserve(mlp->down, ubatch);
      inner_width = std::max(inner_width, weights_.matrix(mlp->down).columns);
    } else if (const auto* logits = std::get_if<LogitsStep>(&step)) {
      reserve(logits->weight, head_rows);
    }
  }
  const auto activations = [&](uint32_t width, auto& values, auto& means, auto& scales) {
    const uint64_t column_tiles = TileGrid(1, width).column_tiles;
    values =
        DeviceArray<uint16_t>(round_up(ubatch, uint64_t{kMostRows}) * column_tiles * kTileColumns);
    means = DeviceArray<ActivationMeans>(kMostRows * column_tiles);
    scales = DeviceArray<float>(std::vector<float>(ubatch, 1.0f));
    NIBBLE_CUDA(cudaMemset(values.data(), 0, values.size() * sizeof(uint16_t)));
    NIBBLE_CUDA(cudaMemset(means.data(), 0, means.size() * sizeof(ActivationMeans)));
    workspace_bytes_ += values.size() * sizeof(uint16_t) + ubatch * sizeof(float) +
                        means.size() * sizeof(ActivationMeans);
  };
  activations(plan_.hidden, normed_values_, normed_means_, normed_scales_);
  activations(inner_width, inner_values_, inner_means_, inner_scales_);
  shared_tiles_ = DeviceArray<std::byte>(many_rows_workspace_bytes(device_shape_));
  NIBBLE_CUDA(cudaMemset(shared_tiles_.data(), 0, shared_tiles_.size()));
  residual_ = DeviceArray<float>(ubatch * plan_.hidden);
  sums_ = DeviceArray<float>(sum_floats);
  ones_ = DeviceArray<float>(std::vector<float>(ubatch, 1.0f));
  for (const auto* floats : {&residual_, &sums_, &ones_})
    workspace_bytes_ += floats->size() * sizeof(float);
  split_parts_ = DeviceArray<SplitPart>(most_split_parts(device_shape_.multiprocessors));
  NIBBLE_CUDA(cudaMemset(split_parts_.data(), 0xff, split_parts_.size() * sizeof(SplitPart)));
  workspace_bytes_ += split_parts_.size() * sizeof(SplitPart);
  if (options_.weights == WeightStorage::kDirect) {
    tiles_ = DeviceArray<std::byte>(tile_bytes + 1);
    workspace_bytes_ += tiles_.size();
  }
  gated_scales_.assign(plan_.steps.size(), 1);
  device_gated_scales_ = DeviceArray<float>(std::span<const float>(gated_scales_));
  gated_overflows_ = make_pinned<uint32_t>(gated_scales_.size());
  std::fill_n(gated_overflows_.get(), gated_scales_.size(), 0);
  sampled_ = make_pinned<int32_t>(ubatch);
}

std::string CudaBackend::description() const {
  return fmt::format("cuda: {}, compute capability {}.{}", device_.name, device_.major,
                     device_.minor);
}

MemoryUse CudaBackend::memory() const {
  return {.weights_bytes = weights_.memory().size(),
          .kv_bytes = kv_.allocated_bytes(),
          .workspace_bytes = workspace_bytes_ + attention_workspace_.size() + shared_tiles_.size()};
}

void CudaBackend::run(const Batch& batch, BatchResult& result) {
  use_device();
  const DeviceTurn turn(options_.device, stream_.handle);
  result.sampled.clear();
  if (!inputs_.send(batch, stream_.handle)) graphs_.clear();
  const StepShape& shape = inputs_.shape();
  NIBBLE_CHECK(shape.rows <= options_.ubatch);
  grow_attention_workspace();

  const bool replay = options_.graphs && shape.decode && shape.rows <= kMostGraphRows &&
                      !batch.observe && !profiler_.on();
  do {  // a step may run again: it writes nothing that it reads
    result.logits.clear();
    if (!replay) {
      launch_step(&batch, &result);
    } else {
      if (batch.stop && batch.stop()) fail(ErrorCode::kCancelled, "cancelled before the step");
      run_graph();
    }
    NIBBLE_CUDA(cudaStreamSynchronize(stream_.handle));
  } while (raise_gated_scales());
  for (uint32_t i = 0; i < shape.requests; ++i) result.sampled.push_back({sampled_.get()[i]});
}

bool CudaBackend::raise_gated_scales() {
  bool raised = false;
  for (size_t i = 0; i < gated_scales_.size(); ++i) {
    if (!std::exchange(gated_overflows_[i], 0) || gated_scales_[i] >= kLargestGatedScale) continue;
    gated_scales_[i] *= kGatedScaleStep;
    raised = true;
  }
  if (raised) device_gated_scales_.upload(gated_scales_);
  return raised;
}

void CudaBackend::run_graph() {
  auto graph = graphs_.find(inputs_.shape());
  if (graph == graphs_.end()) {
    NIBBLE_CUDA(cudaStreamBeginCapture(stream_.handle, cudaStreamCaptureModeThreadLocal));
    cudaGraph_t captured = nullptr;
    try {
      launch_step(nullptr, nullptr);
    } catch (...) {
      cudaStreamEndCapture(stream_.handle, &captured);
      if (captured) cudaGraphDestroy(captured);
      static_cast<void>(cudaGetLastError());  // what was thrown says why
      throw;
    }
    NIBBLE_CUDA(cudaStreamEndCapture(stream_.handle, &captured));
    if (graphs_.size() == kMostGraphs) graphs_.clear();
    graph = graphs_.emplace(inputs_.shape(), captured).first;
  }
  NIBBLE_CUDA(cudaGraphLaunch(graph->second.handle, stream_.handle));
}

void CudaBackend::launch_step(const Batch* batch, BatchResult* result) {
  for (size_t i = 0; i < plan_.steps.size(); ++i) {
    if (batch && batch->stop && batch->stop()) {
      fail(ErrorCode::kCancelled, "cancelled before step {} of {}", i + 1, plan_.steps.size());
    }
    if (const auto* logits = std::get_if<LogitsStep>(&plan_.steps[i])) {
      run_head(*logits, result);
      continue;
    }
    const std::optional<ValueId> written =
        std::visit([&](const auto& step) -> std::optional<ValueId> { return run_step(step, i); },
                   plan_.steps[i]);
    if (written && batch && batch->observe) observe(*batch, i, *written);
  }
}

// The residual's rows in the batch's order.
void CudaBackend::observe(const Batch& batch, size_t step, ValueId value) {
  const size_t width = plan_.hidden;
  std::vector<float> device(rows() * width), ordered;
  NIBBLE_CUDA(cudaMemcpyAsync(device.data(), residual_.data(), device.size() * sizeof(float),
                              cudaMemcpyDeviceToHost, stream_.handle));
  NIBBLE_CUDA(cudaStreamSynchronize(stream_.handle));
  for (uint32_t i = 0; i < batch.sequences.size(); ++i) {
    const auto begin = device.begin() + ptrdiff_t(inputs_.first_row(i) * width);
    ordered.insert(ordered.end(), begin,
                   begin + ptrdiff_t(batch.sequences[i].tokens.size() * width));
  }
  batch.observe(step, value, ordered);
}

const RmsNorm& CudaBackend::next_norm(size_t index) const {
  const Step& next = plan_.steps.at(index + 1);
  if (const auto* qkv = std::get_if<NormQkvStep>(&next)) return qkv->norm;
  if (const auto* mlp = std::get_if<GatedMlpStep>(&next)) return mlp->norm;
  return std::get<LogitsStep>(next).norm;
}

std::optional<ValueId> CudaBackend::run_step(const EmbedStep& step, size_t index) {
  const DeviceMatrix& table = weights_.matrix(step.table);
  NIBBLE_CHECK(table.parts.size() == 1 && !table.parts[0].second);
  const WeightRows& table_rows = table.parts[0].rows[0];
  const bool direct = table_rows.row_bytes > 0;
  const EmbedArgs args = {.tiles = direct ? tiles_.data() : table_rows.data,
                          .layout = table.parts[0].first,
                          .width = table.columns,
                          .tokens = direct ? nullptr : inputs_.tokens(),
                          .scale = step.scale,
                          .residual = residual_.data(),
                          .norm = device_norm(next_norm(index)),
                          .normed = next_normed(index)};
  timed("embed", table.bytes / table.rows * rows(), [&] {
    if (direct) {
      pack_rows_on_device(stream_.handle, args.layout, table_rows.data, inputs_.tokens(), rows(),
                          table.columns, tiles_.data());
    }
    launch_embed(stream_.handle, args);
  });
  return step.output;
}

std::optional<ValueId> CudaBackend::run_step(const NormQkvStep& step, size_t) {
  const AttentionLayer& layer = attention_.at(&step);
  Product product = multiply("q, k, v", step.qkv, normed(rows()));
  // Attention takes sums as they are: scales that may differ from 1 are applied before.
  if (!device_norm(step.norm).in_range) product = add_up(product);
  const AttentionLaunch launch = attention_launch(layer);
  const AttentionArgs args = {.places = inputs_.places(),
                              .sequences = inputs_.sequences(),
                              .tables = inputs_.tables(kv_places_[step.cache.value].group),
                              .sequence_count = inputs_.shape().sequences,
                              .chunks = inputs_.shape().sequences - inputs_.shape().single_rows,
                              .most_pages = inputs_.most_pages(layer.window),
                              .sums = product.sums.values,
                              .parts = product.sums.parts,
                              .stride = product.sums.stride,
                              .workspace = attention_workspace_.data(),
                              .split_parts = split_parts_.data(),
                              .scratch = sums_.data(),
                              .scratch_bytes = sums_.size() * sizeof(float),
                              .output = inner(layer.shape.query_width(), rows()).rows};
  timed(
      layer.window == 0 ? "attention, full" : "attention, window", 0,
      [&] { launch_attention(stream_.handle, layer, launch, args); },
      4.0 * layer.shape.query_width() * double(inputs_.keys_seen(layer.window)));
  return std::nullopt;
}

std::optional<ValueId> CudaBackend::run_step(const ProjectStep& step, size_t index) {
  // Attention's output is a mean of values that f16 holds: it needs no scale.
  ScaledRows input = inner(weights_.matrix(step.weight).columns, rows());
  input.scales = ones_.data();
  update(multiply("attention output", step.weight, input), step.post_norm, step.output_scale,
         index);
  return step.residual;
}

std::optional<ValueId> CudaBackend::run_step(const GatedMlpStep& step, size_t index) {
  const uint32_t ffn = weights_.matrix(step.down).columns;
  const Product gate_up = multiply("gate and up", step.gate_up, normed(rows()));
  const GatedArgs args = {.sums = gate_up.sums,
                          .scales = gate_up.scales,
                          .width = ffn,
                          .gated_scale = device_gated_scales_.data() + index,
                          .overflow = gated_overflows_.get() + index,
                          .gated = inner(ffn, rows())};
  timed("gelu", 0, [&] { launch_gated_gelu(stream_.handle, args); });
  update(multiply("down", step.down, inner(ffn, rows())), step.post_norm, step.output_scale, index);
  return step.residual;
}

void CudaBackend::update(const Product& product, const std::optional<RmsNorm>& post_norm,
                         float output_scale, size_t index) {
  const UpdateArgs args = {.sums = product.sums,
                           .scales = product.scales,
                           .width = plan_.hidden,
                           .has_post_norm = post_norm.has_value(),
                           .post_norm = post_norm ? device_norm(*post_norm) : DeviceNorm{},
                           .output_scale = output_scale,
                           .residual = residual_.data(),
                           .next_norm = device_norm(next_norm(index)),
                           .normed = next_normed(index)};
  timed("norms, residual", 0, [&] { launch_update(stream_.handle, args); });
}

void CudaBackend::run_head(const LogitsStep& step, BatchResult* result) {
  const std::vector<HeadRow>& head = inputs_.head();
  const uint32_t vocabulary = plan_.vocabulary;
  uint32_t first_request = 0;
  for (uint32_t first = 0; first < head.size(); first += most_head_rows_) {
    const uint32_t count = std::min(uint32_t(head.size()) - first, most_head_rows_);
    const ScaledRows input = head_input(count);
    // The rows of a decode step are all wanted, in their order, and normed already.
    if (!inputs_.shape().decode || rows() > most_head_rows_) {
      const NormArgs args = {.residual = residual_.data(),
                             .rows = inputs_.head_rows() + first,
                             .width = plan_.hidden,
                             .norm = device_norm(step.norm),
                             .normed = input};
      timed("head's norm", 0, [&] { launch_norm(stream_.handle, args); });
    }
    const Product product = multiply("head", step.weight, input);
    NIBBLE_CHECK(product.sums.stride == vocabulary);
    float* const logits = sums_.data();  // in place of the product's first part
    const SumArgs sum = {product.sums, product.scales, vocabulary, step.softcap, logits};
    timed("softcap", 0, [&] { launch_sum(stream_.handle, sum); });

    uint32_t requests = 0;
    for (uint32_t i = 0; i < count; ++i) {
      if (head[first + i].download) {
        const size_t at = result->logits.size();
        result->logits.resize(at + vocabulary);
        NIBBLE_CUDA(cudaMemcpyAsync(&result->logits[at], logits + size_t{i} * vocabulary,
                                    vocabulary * sizeof(float), cudaMemcpyDeviceToHost,
                                    stream_.handle));
        NIBBLE_CUDA(cudaStreamSynchronize(stream_.handle));  // before the vector grows again
      }
      requests += head[first + i].sample;
    }
    if (requests == 0) continue;
    const SampleArgs args = {.requests = inputs_.requests() + first_request,
                             .count = requests,
                             .biases = inputs_.biases(),
                             .seen = inputs_.seen(),
                             .logits = logits,
                             .vocabulary = vocabulary,
                             .tokens = sampled_.get() + first_request};
    timed("sampling", 0, [&] { launch_sample(stream_.handle, args); });
    first_request += requests;
  }
}

std::vector<LinearCall> CudaBackend::linear_calls(WeightId weight, uint32_t rows) const {
  const DeviceMatrix& matrix = weights_.matrix(weight);
  const WeightStorage storage = rows > kMatrixTokens ? WeightStorage::kPacked : options_.weights;
  std::vector<LinearCall> calls;
  for (const MatrixPart& part : matrix.parts) {
    FewRowsArgs args = {};
    args.weights[0] = part.rows[0];
    args.weights[1] = part.rows[1];
    args.column_tiles = TileGrid(1, matrix.columns).column_tiles;
    args.rows = rows;
    args.output_stride = matrix.rows;
    calls.push_back({&part, args,
                     choose_few_rows(device_shape_, part.first, part.rows[0].rows, part.second,
                                     part.rows[1].rows, matrix.columns, rows, storage)});
  }
  return calls;
}

Sums CudaBackend::multiply_few(WeightId weight, const ActivationRows& input) {
  std::vector<LinearCall> calls = linear_calls(weight, input.rows);
  const auto parts_of = [](const LinearCall& call) { return call.launch.parts; };
  const Sums sums = {sums_.data(), parts_of(*std::ranges::max_element(calls, {}, parts_of)),
                     input.rows, weights_.matrix(weight).rows};
  const bool equal = std::ranges::all_of(
      calls, [&](const LinearCall& call) { return parts_of(call) == sums.parts; });
  if (!equal) {  // some rows have fewer parts than others
    const size_t floats = size_t{sums.parts} * sums.rows * sums.stride;
    NIBBLE_CUDA(cudaMemsetAsync(sums_.data(), 0, floats * sizeof(float), stream_.handle));
  }
  const DeviceMatrix& matrix = weights_.matrix(weight);
  const std::vector<MatrixPart> parts =
      input.rows > kMatrixTokens ? packed_parts(matrix) : matrix.parts;
  for (size_t i = 0; i < calls.size(); ++i) {
    LinearCall& call = calls[i];
    std::ranges::copy(parts[i].rows, call.args.weights);
    call.args.activations = input.values;
    call.args.means = input.means;
    call.args.output = sums_.data();
    launch_few_rows(stream_.handle, call.part->first, call.part->second, call.args, call.launch);
  }
  return sums;
}

std::vector<MatrixPart> CudaBackend::packed_parts(const DeviceMatrix& matrix) {
  std::vector<MatrixPart> parts = matrix.parts;
  std::byte* tiles = tiles_.data();
  for (MatrixPart& part : parts) {
    for (uint32_t i = 0; i < 2; ++i) {
      WeightRows& rows = part.rows[i];
      if (rows.row_bytes == 0) continue;
      pack_rows_on_device(stream_.handle, part.layout(i), rows.data, nullptr, rows.rows,
                          matrix.columns, tiles);
      rows.data = tiles;
      rows.row_bytes = 0;
      tiles += round_up(packed_bytes(part.layout(i), rows.rows, matrix.columns), kTileAlignment);
    }
  }
  // Products don't wait for their weights, unless something other than a kernel is in front.
  if (tiles != tiles_.data())
    NIBBLE_CUDA(cudaMemsetAsync(&tiles_.data()[tiles_.size() - 1], 0, 1, stream_.handle));
  return parts;
}

// Rows of several layouts share the parts of one result: then there is one.
ManyRowsLaunch CudaBackend::many_rows_launch(const DeviceMatrix& matrix, LayoutId layout,
                                             const WeightRows& weights, uint32_t rows) const {
  const bool one_layout = weights.rows == matrix.rows;
  return choose_many_rows(device_shape_, device_matrix_unit(), layout, weights.rows, matrix.columns,
                          rows, one_layout);
}

Sums CudaBackend::multiply_many(const DeviceMatrix& matrix, const ScaledRows& input) {
  const std::vector<MatrixPart> parts = packed_parts(matrix);
  const ActivationBlocks blocks = {input.rows.values, input.rows.rows, input.rows.column_tiles};
  const auto arguments = [&](const WeightRows& first, const WeightRows& second) -> ManyRowsArgs {
    return {{first, second}, blocks, input.scales, sums_.data(), matrix.rows, shared_tiles_.data()};
  };
  uint32_t result_parts = 1;
  const auto launch_rows = [&](LayoutId layout, const WeightRows& weights) {
    if (weights.rows == 0) return;
    const ManyRowsLaunch launch = many_rows_launch(matrix, layout, weights, blocks.rows);
    result_parts = launch.column_chunks;
    launch_many_rows(stream_.handle, layout, arguments(weights, {}), launch);
  };
  for (const MatrixPart& part : parts) {
    const auto& [first, second] = part.rows;
    if (part.second && first.rows > 0 && second.rows > 0 &&
        has_many_rows_kernel(device_matrix_unit(), part.first, *part.second, blocks.rows)) {
      launch_many_rows(stream_.handle, part.first, *part.second, arguments(first, second),
                       choose_many_rows(device_shape_, part.first, first.rows, *part.second,
                                        second.rows, matrix.columns, blocks.rows));
    } else {
      launch_rows(part.first, first);
      if (part.second) launch_rows(*part.second, second);
    }
  }
  return {sums_.data(), result_parts, blocks.rows, matrix.rows};
}

Product CudaBackend::multiply(std::string_view what, WeightId weight, const ScaledRows& input) {
  const DeviceMatrix& matrix = weights_.matrix(weight);
  Product product = {};
  const auto launch = [&] {
    if (input.rows.in_blocks) {
      product = {multiply_many(matrix, input), ones_.data()};
    } else {
      product = {multiply_few(weight, input.rows), input.scales};
    }
  };
  timed(what, matrix.bytes, launch, 2.0 * matrix.rows * matrix.columns * input.rows.rows);
  return product;
}

Product CudaBackend::add_up(const Product& product) {
  if (product.scales == ones_.data()) return product;
  const uint32_t width = product.sums.stride;
  launch_sum(stream_.handle, {product.sums, product.scales, width, 0, sums_.data()});
  return {{sums_.data(), 1, product.sums.rows, width}, ones_.data()};
}

void CudaBackend::grow_attention_workspace() {
  uint64_t bytes = 0;
  for (const auto& [step, layer] : attention_) {
    bytes = std::max(bytes, attention_workspace_bytes(layer.shape, attention_launch(layer)));
  }
  if (bytes <= attention_workspace_.size()) return;
  graphs_.clear();
  attention_workspace_ = {};
  attention_workspace_ = DeviceArray<std::byte>(bytes);
}

}  // namespace

uint32_t device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? uint32_t(count) : 0;
}

DeviceInfo device_info(uint32_t device) {
  cudaDeviceProp properties;
  NIBBLE_CUDA(cudaGetDeviceProperties(&properties, int(device)));
  int current;
  NIBBLE_CUDA(cudaGetDevice(&current));
  NIBBLE_CUDA(cudaSetDevice(int(device)));
  size_t free, total;
  NIBBLE_CUDA(cudaMemGetInfo(&free, &total));
  NIBBLE_CUDA(cudaSetDevice(current));
  return {.name = properties.name,
          .multiprocessors = uint32_t(properties.multiProcessorCount),
          .major = uint32_t(properties.major),
          .minor = uint32_t(properties.minor),
          .memory_bytes = total,
          .free_bytes = free};
}

uint64_t free_bytes_for(const Plan& plan, WeightStorage storage, uint32_t device) {
  const uint64_t free = select(device).free_bytes;
  const uint64_t stored = stored_bytes(plan, storage), in_file = plan.weight_bytes();
  const uint64_t more = stored > in_file ? stored - in_file : 0;
  return free > more ? free - more : 0;
}

std::unique_ptr<Backend> make_cuda_backend(const Plan& plan, const BackendOptions& options,
                                           const Progress& progress) {
  return std::make_unique<CudaBackend>(plan, options, progress);
}

}  // namespace nibble::cuda
