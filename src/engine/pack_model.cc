#include "engine/pack_model.h"

#include <algorithm>
#include <exception>
#include <mutex>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "base/aligned_array.h"
#include "base/checked_math.h"
#include "base/error.h"
#include "base/thread_pool.h"
#include "cuda/layouts/arrangement.h"
#include "engine/packed_format.h"
#include "engine/packed_model.h"
#include "engine/partial_file.h"

namespace nibble::engine {
namespace {

using backend::WeightSegment;
using packed::Header;
namespace key = packed::key;

constexpr uint64_t kTilesAtOnce = uint64_t{4} << 20;  // bytes that a thread packs at a time

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

// The parts of a GGUF file, little-endian.
class GgufText {
 public:
  template <class T>
  void number(T value) {
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void string(std::string_view value) {
    number(uint64_t(value.size()));
    text_ += value;
  }
  void bytes(std::span<const std::byte> bytes) {
    text_.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  }
  void pad(uint64_t alignment) { text_.resize(round_up(text_.size(), alignment)); }

  void entry(std::string_view key, std::string_view value) {
    begin(key, gguf::ValueType::kString);
    string(value);
  }
  void entry(std::string_view key, uint64_t value) {
    begin(key, gguf::ValueType::kUint64);
    number(value);
  }
  void entry(std::string_view key, const std::vector<std::string>& values) {
    begin_array(key, gguf::ValueType::kString, values.size());
    for (const std::string& value : values) string(value);
  }
  void entry(std::string_view key, const std::vector<uint64_t>& values) {
    begin_array(key, gguf::ValueType::kUint64, values.size());
    for (const uint64_t value : values) number(value);
  }

  uint64_t entries() const { return entries_; }
  const std::string& text() const { return text_; }

 private:
  void begin(std::string_view key, gguf::ValueType type) {
    string(key);
    number(type);
    ++entries_;
  }
  void begin_array(std::string_view key, gguf::ValueType type, size_t count) {
    begin(key, gguf::ValueType::kArray);
    number(type);
    number(uint64_t(count));
  }

  std::string text_;
  uint64_t entries_ = 0;
};

// What the packed model says about the source and about itself.
struct Origin {
  std::string name;
  uint64_t bytes;
  std::string hash;
};

std::vector<const gguf::Tensor*> unpacked_tensors(const gguf::GgufFile& source,
                                                  const backend::Plan& plan) {
  std::set<std::string_view> packed;
  for (const backend::Weight& weight : plan.weights) {
    for (const WeightSegment& segment : weight.segments) packed.insert(segment.name);
  }
  std::vector<const gguf::Tensor*> tensors;
  for (const gguf::Tensor& tensor : source.tensors()) {
    if (!packed.contains(tensor.name)) tensors.push_back(&tensor);
  }
  return tensors;
}

// The keys under nibble.pack.
GgufText manifest(const cuda::Arrangement& arrangement, const Origin& origin,
                  std::vector<std::string> hashes) {
  std::vector<std::string> layouts, names;
  std::vector<uint64_t> versions, types, rows, columns;
  std::vector<uint64_t> weight_tensors, weight_layouts, offsets, bytes;
  for (size_t i = 0; i < arrangement.runs.size(); ++i) {
    const uint32_t width = arrangement.distinct[i]->columns;
    for (const cuda::Run& run : arrangement.runs[i]) {
      const std::string layout(cuda::layout_name(run.layout));
      const auto place = std::find(layouts.begin(), layouts.end(), layout);
      weight_layouts.push_back(uint64_t(place - layouts.begin()));
      if (place == layouts.end()) {
        layouts.push_back(layout);
        versions.push_back(cuda::layout_version(run.layout));
      }
      weight_tensors.push_back(run.segments.size());
      offsets.push_back(run.offset);
      bytes.push_back(cuda::packed_bytes(run.layout, run.rows, width));
      for (const WeightSegment* segment : run.segments) {
        names.push_back(segment->name);
        types.push_back(uint64_t(segment->type));
        rows.push_back(segment->rows);
        columns.push_back(width);
      }
    }
  }
  GgufText text;
  text.entry(key::kBackend, packed::kBackend);
  text.entry(key::kArchitecture, packed::kArchitecture);
  text.entry(key::kSourceName, origin.name);
  text.entry(key::kSourceBytes, origin.bytes);
  text.entry(key::kSourceHash, origin.hash);
  text.entry(key::kLayoutNames, layouts);
  text.entry(key::kLayoutVersions, versions);
  text.entry(key::kTensorNames, names);
  text.entry(key::kTensorTypes, types);
  text.entry(key::kTensorRows, rows);
  text.entry(key::kTensorColumns, columns);
  text.entry(key::kWeightTensors, weight_tensors);
  text.entry(key::kWeightLayouts, weight_layouts);
  text.entry(key::kWeightOffsets, offsets);
  text.entry(key::kWeightBytes, bytes);
  text.entry(key::kWeightHashes, hashes);
  return text;
}

// A GGUF file up to its tensors' data: the source's keys, the manifest's, the unpacked tensors.
std::string section_head(const gguf::GgufFile& source, const GgufText& manifest,
                         const std::vector<const gguf::Tensor*>& unpacked, uint64_t alignment) {
  GgufText text;
  text.bytes(bytes_of("GGUF"));
  text.number(uint32_t{3});
  text.number(uint64_t(unpacked.size()));
  text.number(uint64_t(source.metadata().size()) + manifest.entries());
  text.bytes(source.metadata_bytes());
  text.bytes(bytes_of(manifest.text()));
  uint64_t offset = 0;
  for (const gguf::Tensor* tensor : unpacked) {
    text.string(tensor->name);
    text.number(uint32_t(tensor->dimensions.size()));
    for (const uint64_t dimension : tensor->dimensions) text.number(dimension);
    text.number(tensor->type);
    text.number(offset);
    offset += round_up(uint64_t(tensor->data.size()), alignment);
  }
  text.pad(alignment);
  return text.text();
}

// Rows of a segment that are packed together.
struct Job {
  const WeightSegment* segment;
  uint32_t columns, first_row, rows;
  uint64_t bytes;  // of tiles
};

std::vector<Job> jobs_of(const cuda::Run& run, uint32_t columns) {
  const uint64_t row_tile = cuda::packed_bytes(run.layout, cuda::kTileRows, columns);
  const uint32_t most = uint32_t(std::max<uint64_t>(1, kTilesAtOnce / row_tile)) * cuda::kTileRows;
  std::vector<Job> jobs;
  for (const WeightSegment* segment : run.segments) {
    for (uint32_t first = 0; first < segment->rows; first += most) {
      const uint32_t rows = std::min(most, segment->rows - first);
      jobs.push_back(
          {segment, columns, first, rows, cuda::packed_bytes(run.layout, rows, columns)});
    }
  }
  return jobs;
}

// Bytes that are written one behind the other and share one hash.
class HashedStretch {
 public:
  explicit HashedStretch(PartialFile& file) : file_(file) {}
  void append(std::span<const std::byte> bytes) {
    file_.write(bytes);
    hasher_.update(bytes);
    size_ += bytes.size();
  }
  void pad(uint64_t alignment) {
    append(std::vector<std::byte>(round_up(size_, alignment) - size_));
  }
  ContentHash digest() const { return hasher_.digest(); }

 private:
  PartialFile& file_;
  ContentHasher hasher_;
  uint64_t size_ = 0;
};

// Packs with several threads and writes and hashes in order, in memory of some megabytes a thread.
class Packer {
 public:
  Packer(PartialFile& file, uint32_t threads, uint64_t total, const Progress& progress)
      : file_(file),
        pool_(threads),
        buffers_(2 * pool_.size()),
        total_(total),
        progress_(progress) {}

  // Returns the hash of the run's tiles and of the zeros up to the next page.
  ContentHash write(const cuda::Run& run, uint32_t columns) {
    const std::vector<Job> jobs = jobs_of(run, columns);
    HashedStretch stretch(file_);
    for (size_t first = 0; first < jobs.size(); first += buffers_.size()) {
      const auto batch =
          std::span(jobs).subspan(first, std::min(buffers_.size(), jobs.size() - first));
      pack(batch);
      for (size_t i = 0; i < batch.size(); ++i) {
        stretch.append({buffers_[i].data(), batch[i].bytes});
        done_ += batch[i].bytes;
      }
      if (progress_) progress_("packing", done_, total_);
    }
    stretch.pad(packed::kPageBytes);
    return stretch.digest();
  }

 private:
  void pack(std::span<const Job> batch) {
    std::mutex mutex;
    std::exception_ptr error;
    pool_.for_each_chunk(batch.size(), 1, [&](size_t i, size_t, uint32_t) {
      try {
        const Job& job = batch[i];
        if (buffers_[i].bytes() < job.bytes) buffers_[i] = AlignedArray<std::byte>(job.bytes);
        cuda::pack_rows(*job.segment, job.columns, job.first_row, job.rows, buffers_[i].data());
      } catch (...) {
        const std::lock_guard lock(mutex);
        error = std::current_exception();
      }
    });
    if (error) std::rethrow_exception(error);
  }

  PartialFile& file_;
  ThreadPool pool_;
  std::vector<AlignedArray<std::byte>> buffers_;
  const uint64_t total_;
  uint64_t done_ = 0;
  const Progress& progress_;
};

void check_room(const std::filesystem::path& output, uint64_t needed) {
  std::error_code error;
  const auto folder = std::filesystem::absolute(output).parent_path();
  const uint64_t available = std::filesystem::space(folder, error).available;
  if (!error && available < needed) {
    fail(ErrorCode::kIo, "{} needs {} bytes, but {} has {} free", output.string(), needed,
         folder.string(), available);
  }
}

void check_source(const ModelFile& model, const std::filesystem::path& source,
                  const std::filesystem::path& output) {
  if (model.packed()) {
    fail(ErrorCode::kInvalidArgument, "{} is packed already; pack {}, its source", source.string(),
         model.packed()->source_name());
  }
  for (const gguf::Metadata& entry : model.gguf().metadata()) {
    if (entry.key.starts_with(key::kPrefix)) {
      fail(ErrorCode::kInvalidArgument, "{} has a key {}, which only packed models may have",
           source.string(), entry.key);
    }
  }
  for (const MappedFile& part : model.gguf().parts()) {
    if (part.is(output)) {
      fail(ErrorCode::kInvalidArgument, "{} would replace its own source; write to another file",
           output.string());
    }
  }
}

}  // namespace

void pack_model(const std::filesystem::path& source_path, const std::filesystem::path& output,
                const PackOptions& options, const Progress& progress) {
  if (options.backend != packed::kBackend) {
    fail(ErrorCode::kUnsupported, "this build packs for backend '{}', not '{}'", packed::kBackend,
         options.backend);
  }
  const ModelFile model = ModelFile::open(source_path);
  check_source(model, source_path, output);
  const gguf::GgufFile& source = model.gguf();
  const backend::Plan plan = model.build_plan();
  const cuda::Arrangement arrangement(plan, packed::kPageBytes);
  const std::vector<const gguf::Tensor*> unpacked = unpacked_tensors(source, plan);
  const uint64_t alignment = source.find_uint("general.alignment").value_or(32);

  // Where things lie does not depend on the hashes, which come last.
  const std::string no_hash = to_hex({});
  Origin origin{source_path.filename().string(), source.file_bytes(), no_hash};
  std::vector<std::string> hashes;
  for (const std::vector<cuda::Run>& runs : arrangement.runs)
    hashes.resize(hashes.size() + runs.size(), no_hash);
  uint64_t model_bytes =
      section_head(source, manifest(arrangement, origin, hashes), unpacked, alignment).size();
  for (const gguf::Tensor* tensor : unpacked)
    model_bytes += round_up(uint64_t(tensor->data.size()), alignment);
  const uint64_t weights_begin = round_up(sizeof(Header) + model_bytes, packed::kPageBytes);
  check_room(output, weights_begin + arrangement.bytes);

  origin.hash = hash_source(source, progress);
  PartialFile file(output);
  file.seek(weights_begin);
  Packer packer(file, options.threads, arrangement.bytes, progress);
  auto next_hash = hashes.begin();
  for (size_t i = 0; i < arrangement.runs.size(); ++i) {
    for (const cuda::Run& run : arrangement.runs[i])
      *next_hash++ = to_hex(packer.write(run, arrangement.distinct[i]->columns));
  }

  Header header{.magic = {},
                .version = packed::kFormatVersion,
                .file_bytes = weights_begin + arrangement.bytes,
                .model_bytes = weights_begin - sizeof(Header),
                .model_hash = {},
                .reserved = {}};
  packed::kMagic.copy(header.magic, sizeof header.magic);
  file.seek(sizeof header);
  HashedStretch section(file);
  section.append(
      bytes_of(section_head(source, manifest(arrangement, origin, hashes), unpacked, alignment)));
  for (const gguf::Tensor* tensor : unpacked) {
    section.append(tensor->data);
    section.pad(alignment);
  }
  section.append(std::vector<std::byte>(weights_begin - sizeof header - model_bytes));
  header.model_hash = section.digest();
  file.seek(0);
  file.write(std::as_bytes(std::span(&header, 1)));
  file.finish();
}

}  // namespace nibble::engine
