#include "cuda/memory/device_weights.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>

#include "base/thread_pool.h"
#include "cuda/handles.h"
#include "cuda/layouts/pack.h"

namespace nibble::cuda {
namespace {

using backend::Weight;
using backend::WeightSegment;
using backend::WeightStorage;

constexpr uint64_t kAlignment = 256;                   // of a run
constexpr uint64_t kStagingBytes = uint64_t{8} << 20;  // that a thread copies at a time
constexpr uint32_t kMaxThreads = 8;                    // more do not fill the bus better

// Rows of a segment that are copied together, and packed if they are not yet as they shall be.
struct Chunk {
  const WeightSegment* segment;
  LayoutId layout;
  uint32_t columns;
  uint32_t first_row;  // of the segment, a multiple of kTileRows
  uint32_t rows;
  std::byte* stored;  // the segment
  WeightStorage storage;

  bool must_pack() const { return storage == WeightStorage::kPacked && !segment->packed; }
};

// What 16 rows are on their way to the device: tiles of a packed model, else blocks.
uint64_t row_tile_bytes(const WeightSegment& segment, uint32_t columns) {
  if (segment.packed) return packed_bytes(layout_of(segment.type), kTileRows, columns);
  return kTileRows * quant::row_bytes(packed_from(segment.type), columns);
}

std::vector<Chunk> chunks_of(const Arrangement& arrangement, WeightStorage storage,
                             std::byte* memory, uint64_t staging_bytes) {
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < arrangement.runs.size(); ++i) {
    const uint32_t columns = arrangement.distinct[i]->columns;
    for (const Run& run : arrangement.runs[i]) {
      std::byte* stored = memory + run.offset;
      for (const WeightSegment* segment : run.segments) {
        const uint32_t most =
            uint32_t(staging_bytes / row_tile_bytes(*segment, columns)) * kTileRows;
        for (uint32_t first = 0; first < segment->rows; first += most) {
          chunks.push_back({segment, run.layout, columns, first,
                            std::min(most, segment->rows - first), stored, storage});
        }
        stored += stored_bytes(run.layout, segment->rows, columns, storage);
      }
    }
  }
  return chunks;
}

// Enough for a row of tiles of the widest matrix.
uint64_t staging_bytes(const backend::Plan& plan) {
  uint64_t bytes = kStagingBytes;
  for (const Weight& weight : plan.weights) {
    for (const WeightSegment& segment : weight.segments)
      bytes = std::max(bytes, row_tile_bytes(segment, weight.columns));
  }
  return bytes;
}

// One thread's way to the device: two buffers, so that one is filled while the other one travels.
class Lane {
 public:
  explicit Lane(uint64_t bytes) : slots_{Slot(bytes), Slot(bytes)} {}
  ~Lane() { cudaStreamSynchronize(stream_.handle); }

  void send(const Chunk& chunk) {
    Slot& slot = slots_[next_];
    next_ ^= 1;
    NIBBLE_CUDA(cudaEventSynchronize(slot.free.handle));
    const auto stored = [&](uint32_t rows) {
      return stored_bytes(chunk.layout, rows, chunk.columns, chunk.storage);
    };
    const uint64_t offset = stored(chunk.first_row);
    uint64_t bytes = stored(chunk.rows);
    if (chunk.segment->packed) {
      std::memcpy(slot.host.get(), &chunk.segment->data[offset], bytes);
    } else {
      bytes = chunk.rows * quant::row_bytes(packed_from(chunk.segment->type), chunk.columns);
      read_blocks(*chunk.segment, chunk.columns, chunk.first_row, chunk.rows, slot.host.get());
    }
    void* const to = chunk.must_pack() ? slot.device.data() : chunk.stored + offset;
    NIBBLE_CUDA(
        cudaMemcpyAsync(to, slot.host.get(), bytes, cudaMemcpyHostToDevice, stream_.handle));
    if (chunk.must_pack()) {
      pack_on_device(stream_.handle, chunk.layout, to, chunk.rows, chunk.columns,
                     chunk.first_row / kTileRows, chunk.stored);
    }
    NIBBLE_CUDA(cudaEventRecord(slot.free.handle, stream_.handle));
  }
  void finish() { NIBBLE_CUDA(cudaStreamSynchronize(stream_.handle)); }

 private:
  struct Slot {
    explicit Slot(uint64_t bytes) : host(make_pinned<std::byte>(bytes)), device(bytes) {}
    Pinned<std::byte> host;
    DeviceArray<std::byte> device;
    Event free{cudaEventDisableTiming};
  };
  Stream stream_;
  Slot slots_[2];
  uint32_t next_ = 0;
};

void load(const std::vector<Chunk>& chunks, uint64_t staging, const Progress& progress) {
  uint64_t total = 0;
  for (const Chunk& chunk : chunks)
    total += chunk.rows * quant::row_bytes(chunk.segment->type, chunk.columns);
  int device;
  NIBBLE_CUDA(cudaGetDevice(&device));
  std::atomic<size_t> next = 0;
  std::atomic<uint64_t> done = 0;
  std::mutex mutex;
  std::exception_ptr error;
  const std::thread::id caller = std::this_thread::get_id();
  ThreadPool pool(std::clamp<uint32_t>(std::thread::hardware_concurrency(), 1,
                                       std::min<uint32_t>(kMaxThreads, uint32_t(chunks.size()))));
  pool.run([&](uint32_t) {
    try {
      NIBBLE_CUDA(cudaSetDevice(device));
      Lane lane(staging);
      for (size_t i; (i = next++) < chunks.size();) {
        lane.send(chunks[i]);
        done += chunks[i].rows * quant::row_bytes(chunks[i].segment->type, chunks[i].columns);
        if (progress && std::this_thread::get_id() == caller) progress("loading", done, total);
      }
      lane.finish();
    } catch (...) {
      const std::lock_guard lock(mutex);
      error = std::current_exception();
      next = chunks.size();
    }
  });
  if (error) std::rethrow_exception(error);
  if (progress) progress("loading", total, total);
}

// Pairs runs that one kernel takes together; the others get one each.
std::vector<MatrixPart> parts_of(const std::vector<Run>& runs, uint32_t columns,
                                 WeightStorage storage, const std::byte* memory) {
  const auto rows = [&](const Run& run) {
    const bool direct = storage == WeightStorage::kDirect;
    return WeightRows{memory + run.offset, run.rows, run.first_row,
                      direct ? stored_bytes(run.layout, 1, columns, storage) : 0};
  };
  std::vector<MatrixPart> parts;
  std::vector<bool> taken(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    if (taken[i]) continue;
    MatrixPart part{runs[i].layout, {}, {rows(runs[i]), {}}};
    for (size_t j = i + 1; j < runs.size() && !part.second; ++j) {
      if (taken[j]) continue;
      if (has_few_rows_kernel(runs[i].layout, runs[j].layout)) {
        part = {runs[i].layout, runs[j].layout, {rows(runs[i]), rows(runs[j])}};
      } else if (has_few_rows_kernel(runs[j].layout, runs[i].layout)) {
        part = {runs[j].layout, runs[i].layout, {rows(runs[j]), rows(runs[i])}};
      } else {
        continue;
      }
      taken[j] = true;
    }
    parts.push_back(part);
  }
  return parts;
}

}  // namespace

uint64_t stored_bytes(const backend::Plan& plan, WeightStorage storage) {
  return Arrangement(plan, kAlignment, storage).bytes;
}

DeviceWeights::DeviceWeights(const backend::Plan& plan, WeightStorage storage,
                             const Progress& progress) {
  const Arrangement arrangement(plan, kAlignment, storage);
  memory_ = DeviceArray<std::byte>(arrangement.bytes);
  const uint64_t staging = staging_bytes(plan);
  load(chunks_of(arrangement, storage, memory_.data(), staging), staging, progress);
  for (size_t i = 0; i < plan.weights.size(); ++i) {
    const std::vector<Run>& runs = arrangement.runs[arrangement.of_weight[i]];
    const Weight& weight = plan.weights[i];
    uint64_t bytes = 0;
    for (const Run& run : runs)
      bytes += stored_bytes(run.layout, run.rows, weight.columns, storage);
    matrices_.push_back({weight.rows(), weight.columns, bytes,
                         parts_of(runs, weight.columns, storage, memory_.data())});
  }
}

}  // namespace nibble::cuda
