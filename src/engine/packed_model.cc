#include "engine/packed_model.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/checked_math.h"
#include "base/error.h"
#include "cuda/layouts/arrangement.h"
#include "engine/packed_format.h"
#include "model/model.h"

namespace nibble::engine {
namespace {

using packed::Header;
namespace key = packed::key;

constexpr uint64_t kHashedAtOnce = uint64_t{16} << 20;

// Feeds `bytes` to the hasher, and says so now and then.
void hash(std::span<const std::byte> bytes, ContentHasher& hasher, std::string_view what,
          uint64_t& done, uint64_t total, const Progress& progress) {
  while (!bytes.empty()) {
    const size_t count = size_t(std::min<uint64_t>(bytes.size(), kHashedAtOnce));
    hasher.update(bytes.first(count));
    bytes = bytes.subspan(count);
    done += count;
    if (progress) progress(what, done, total);
  }
}

Header read_header(std::span<const std::byte> bytes, const std::string& name) {
  Header header;
  if (bytes.size() < sizeof header) {
    fail(ErrorCode::kMalformedFile,
         "{}: {} bytes found, a packed model has a header of {}; it is cut short", name,
         bytes.size(), sizeof header);
  }
  std::memcpy(&header, bytes.data(), sizeof header);
  if (!PackedModel::recognizes(bytes)) {
    fail(ErrorCode::kMalformedFile, "{}: does not begin with '{}': this is no packed model", name,
         packed::kMagic);
  }
  if (header.version != packed::kFormatVersion) {
    fail(ErrorCode::kUnsupported,
         "{}: packed model format version {} found, this build needs version {}: run nibble pack "
         "again",
         name, header.version, packed::kFormatVersion);
  }
  if (header.file_bytes != bytes.size()) {
    fail(ErrorCode::kMalformedFile,
         "{}: {} bytes found, the header says {}; the file is cut short or damaged: run nibble "
         "pack again",
         name, bytes.size(), header.file_bytes);
  }
  const bool in_pages = (sizeof header + header.model_bytes) % packed::kPageBytes == 0;
  if (header.model_bytes > bytes.size() - sizeof header || !in_pages || header.reserved[0] != 0 ||
      header.reserved[1] != 0) {
    fail(ErrorCode::kMalformedFile, "{}: the header is damaged: run nibble pack again", name);
  }
  return header;
}

std::span<const std::byte> model_section(std::span<const std::byte> bytes,
                                         const std::string& name) {
  const Header header = read_header(bytes, name);
  const auto section = bytes.subspan(sizeof header, header.model_bytes);
  const ContentHash found = content_hash(section);
  if (found != header.model_hash) {
    fail(ErrorCode::kMalformedFile,
         "{}: the model section's content hash is {}, the header says {}; the file is damaged: "
         "run nibble pack again",
         name, to_hex(found), to_hex(header.model_hash));
  }
  return section;
}

std::optional<cuda::LayoutId> find_layout(std::string_view name) {
  for (uint32_t i = 0; i < cuda::kLayoutCount; ++i) {
    const cuda::LayoutId id{i};
    if (cuda::layout_name(id) == name) return id;
  }
  return std::nullopt;
}

// An array that the format demands, with as many elements as those beside it have.
template <class T>
std::vector<T> required(std::optional<std::vector<T>> found, std::string_view key,
                        const std::string& name, std::optional<size_t> size = std::nullopt) {
  if (!found) fail(ErrorCode::kMalformedFile, "{}: key {} is missing", name, key);
  if (size && found->size() != *size) {
    fail(ErrorCode::kMalformedFile, "{}: key {} has {} elements, expected {}", name, key,
         found->size(), *size);
  }
  return *std::move(found);
}

std::string joined(std::span<const std::string_view> names) {
  return fmt::format("{}", fmt::join(names, " + "));
}

}  // namespace

std::string hash_source(const gguf::GgufFile& source, const Progress& progress) {
  ContentHasher hasher;
  uint64_t done = 0;
  for (const MappedFile& part : source.parts())
    hash(part.bytes(), hasher, "hashing", done, source.file_bytes(), progress);
  return to_hex(hasher.digest());
}

bool PackedModel::recognizes(std::span<const std::byte> bytes) {
  return bytes.size() >= packed::kMagic.size() &&
         std::memcmp(bytes.data(), packed::kMagic.data(), packed::kMagic.size()) == 0;
}

PackedModel PackedModel::open(const std::filesystem::path& path) {
  MappedFile mapping = MappedFile::open(path);
  PackedModel model(mapping.bytes(), path.string());
  model.mapping_ = std::move(mapping);
  return model;
}

PackedModel PackedModel::from_bytes(std::span<const std::byte> bytes, std::string name) {
  return PackedModel(bytes, std::move(name));
}

PackedModel::PackedModel(std::span<const std::byte> bytes, std::string name)
    : name_(std::move(name)),
      bytes_(bytes),
      model_(gguf::GgufFile::from_bytes(model_section(bytes, name_), name_)) {
  read_origin();
  read_layouts();
  std::vector<gguf::Tensor> tensors = read_tensors();
  read_weights(tensors);
  model_.describe_tensors(std::move(tensors));
}

std::string PackedModel::again() const {
  return fmt::format("run nibble pack on {} again", source_name_);
}

void PackedModel::read_origin() {
  source_name_ = model_.require_string(key::kSourceName);
  source_bytes_ = model_.require_uint(key::kSourceBytes);
  source_hash_ = model_.require_string(key::kSourceHash);
  backend_ = model_.require_string(key::kBackend);
  architecture_ = model_.require_string(key::kArchitecture);
  if (backend_ != packed::kBackend) {
    fail(ErrorCode::kUnsupported, "{}: packed for backend '{}', this build packs for '{}': {}",
         name_, backend_, packed::kBackend, again());
  }
  if (architecture_ != packed::kArchitecture) {
    fail(ErrorCode::kUnsupported, "{}: packed for architecture {}, this build packs for {}: {}",
         name_, architecture_, packed::kArchitecture, again());
  }
}

std::vector<uint64_t> PackedModel::uints(std::string_view key, size_t size) const {
  return required(model_.find_uint_array(key), key, name_, size);
}

void PackedModel::read_layouts() {
  const auto names =
      required(model_.find_string_array(key::kLayoutNames), key::kLayoutNames, name_);
  const auto versions = uints(key::kLayoutVersions, names.size());
  for (size_t i = 0; i < names.size(); ++i) {
    const std::optional<cuda::LayoutId> id = find_layout(names[i]);
    if (!id) {
      fail(ErrorCode::kUnsupported,
           "{}: layout {} version {} found, which this build does not have: {}", name_, names[i],
           versions[i], again());
    }
    if (versions[i] != cuda::layout_version(*id)) {
      fail(ErrorCode::kUnsupported,
           "{}: layout {} version {} found, this build needs version {}: {}", name_, names[i],
           versions[i], cuda::layout_version(*id), again());
    }
    layouts_.push_back({names[i], versions[i]});
  }
}

std::vector<gguf::Tensor> PackedModel::read_tensors() const {
  const auto names =
      required(model_.find_string_array(key::kTensorNames), key::kTensorNames, name_);
  const auto types = uints(key::kTensorTypes, names.size());
  const auto rows = uints(key::kTensorRows, names.size());
  const auto columns = uints(key::kTensorColumns, names.size());
  std::vector<gguf::Tensor> tensors;
  for (size_t i = 0; i < names.size(); ++i) {
    const quant::QuantTraits* traits =
        quant::find_quant_traits(uint32_t(std::min<uint64_t>(types[i], UINT32_MAX)));
    if (!traits) {
      fail(ErrorCode::kUnsupported, "{}: packed tensor {} was of type {}, which this build lacks",
           name_, names[i], types[i]);
    }
    if (rows[i] == 0 || rows[i] > INT32_MAX || columns[i] == 0 || columns[i] > INT32_MAX ||
        columns[i] % traits->block_values != 0) {
      fail(ErrorCode::kMalformedFile, "{}: packed tensor {} of {} has {} rows of {} values", name_,
           names[i], traits->name, rows[i], columns[i]);
    }
    tensors.push_back({names[i], traits->type, {columns[i], rows[i]}, {}});
  }
  return tensors;
}

void PackedModel::read_weights(std::span<const gguf::Tensor> tensors) {
  const auto hashes =
      required(model_.find_string_array(key::kWeightHashes), key::kWeightHashes, name_);
  const auto counts = uints(key::kWeightTensors, hashes.size());
  const auto layouts = uints(key::kWeightLayouts, hashes.size());
  const auto offsets = uints(key::kWeightOffsets, hashes.size());
  const auto bytes = uints(key::kWeightBytes, hashes.size());
  const uint64_t begin = uint64_t(model_.file_bytes()) + sizeof(Header);
  std::span<const std::byte> left = bytes_.subspan(begin);
  for (size_t i = 0; i < hashes.size(); ++i) {
    const auto damaged = [&](std::string_view what, uint64_t found, const auto& expected) {
      fail(ErrorCode::kMalformedFile, "{}: packed weight {} has {} {}, expected {}: {}", name_, i,
           what, found, expected, again());
    };
    if (counts[i] == 0 || counts[i] > tensors.size())
      damaged("a number of tensors of", counts[i], fmt::format("1 to {}", tensors.size()));
    if (layouts[i] >= layouts_.size())
      damaged("a layout of", layouts[i], fmt::format("less than {}", layouts_.size()));
    const cuda::LayoutId layout = *find_layout(layouts_[layouts[i]].name);
    PackedWeight weight{layouts_[layouts[i]].name, {}, 0, tensors[0].columns(), {}, {}, hashes[i]};
    uint64_t needed = 0;
    for (const gguf::Tensor& tensor : tensors.first(counts[i])) {
      if (tensor.columns() != weight.columns)
        damaged("rows of values of", tensor.columns(), weight.columns);
      weight.tensors.push_back(tensor.name);
      weight.rows += tensor.rows();
      needed += cuda::packed_bytes(layout, uint32_t(tensor.rows()), uint32_t(tensor.columns()));
      if (needed > left.size()) damaged("bytes of", needed, fmt::format("at most {}", left.size()));
    }
    // Weights lie one behind the other, each from a page on, up to the end of the file.
    const uint64_t offset = uint64_t(left.data() - bytes_.data()) - begin;
    if (offsets[i] != offset) damaged("an offset of", offsets[i], offset);
    if (bytes[i] != needed) damaged("bytes of", bytes[i], needed);
    const uint64_t stretch = round_up(needed, packed::kPageBytes);
    if (stretch > left.size()) damaged("bytes of", stretch, fmt::format("at most {}", left.size()));
    weight.data = left.first(needed);
    weight.stretch = left.first(stretch);
    left = left.subspan(stretch);
    for (uint64_t at = 0; const gguf::Tensor& tensor : tensors.first(counts[i])) {
      const uint64_t size =
          cuda::packed_bytes(layout, uint32_t(tensor.rows()), uint32_t(tensor.columns()));
      tiles_.emplace(tensor.name, weight.data.subspan(at, size));
      at += size;
    }
    tensors = tensors.subspan(counts[i]);
    weights_.push_back(std::move(weight));
  }
  if (!left.empty() || !tensors.empty()) {
    fail(ErrorCode::kMalformedFile, "{}: {} bytes and {} tensors belong to no packed weight: {}",
         name_, left.size(), tensors.size(), again());
  }
}

std::span<const std::byte> PackedModel::tiles(std::string_view tensor) const {
  const auto found = tiles_.find(tensor);
  return found == tiles_.end() ? std::span<const std::byte>{} : found->second;
}

backend::Plan PackedModel::build_plan() const {
  backend::Plan plan = model::build_plan(model_);
  for (backend::Weight& weight : plan.weights) {
    for (backend::WeightSegment& segment : weight.segments) {
      segment.data = tiles(segment.name);
      segment.packed = true;
      if (segment.data.empty()) {
        fail(ErrorCode::kUnsupported, "{}: tensor {} is not packed, this build needs it so: {}",
             name_, segment.name, again());
      }
    }
  }
  // What this build would pack must be what the file has.
  std::span<const PackedWeight> left = weights_;
  const cuda::Arrangement arrangement(plan, packed::kPageBytes);
  for (const std::vector<cuda::Run>& runs : arrangement.runs) {
    for (const cuda::Run& run : runs) {
      std::vector<std::string_view> tensors;
      for (const backend::WeightSegment* segment : run.segments) tensors.push_back(segment->name);
      const std::string_view layout = cuda::layout_name(run.layout);
      if (left.empty() || left[0].tensors != tensors || left[0].layout != layout) {
        fail(ErrorCode::kUnsupported, "{}: packed weight {} found, this build needs {} of {}: {}",
             name_,
             left.empty() ? "(none)"
                          : fmt::format("{} of {}", left[0].layout, joined(left[0].tensors)),
             layout, joined(tensors), again());
      }
      left = left.subspan(1);
    }
  }
  if (!left.empty()) {
    fail(ErrorCode::kUnsupported, "{}: packed weight {} of {} found, this build needs none: {}",
         name_, left[0].layout, joined(left[0].tensors), again());
  }
  return plan;
}

void PackedModel::verify(const Progress& progress) const {
  uint64_t total = 0, done = 0;
  for (const PackedWeight& weight : weights_) total += weight.stretch.size();
  for (const PackedWeight& weight : weights_) {
    ContentHasher hasher;
    hash(weight.stretch, hasher, "verifying", done, total, progress);
    const std::string found = to_hex(hasher.digest());
    if (found != weight.hash) {
      fail(ErrorCode::kMalformedFile,
           "{}: the content hash of {} is {}, expected {}; the file is damaged: {}", name_,
           joined(weight.tensors), found, weight.hash, again());
    }
  }
}

void PackedModel::check_source(const std::filesystem::path& path, const Progress& progress) const {
  const gguf::GgufFile source = gguf::GgufFile::open(path);
  const std::string found =
      source.file_bytes() == source_bytes_ ? hash_source(source, progress) : "of another length";
  if (found != source_hash_) {
    fail(ErrorCode::kInvalidArgument,
         "{} was packed from another file: {} of {} bytes, content hash {}; {} has {} bytes, "
         "content hash {}",
         name_, source_name_, source_bytes_, source_hash_, path.string(), source.file_bytes(),
         found);
  }
}

ModelFile ModelFile::open(const std::filesystem::path& path) {
  ModelFile file;
  if (PackedModel::recognizes(MappedFile::open(path).bytes())) {
    file.packed_ = PackedModel::open(path);
  } else {
    file.gguf_ = gguf::GgufFile::open(path);
  }
  return file;
}

backend::Plan ModelFile::build_plan() const {
  return packed_ ? packed_->build_plan() : model::build_plan(*gguf_);
}

}  // namespace nibble::engine
