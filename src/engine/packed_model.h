#pragma once
// Packed models: files that hold a model's matrices as a backend's kernels take them. Format:
// docs/formats/packed-model.md.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "backend/plan.h"
#include "base/mapped_file.h"
#include "base/progress.h"
#include "gguf/gguf_file.h"

namespace nibble::engine {

struct PackedLayout {
  std::string_view name;
  uint64_t version;
};

// Tensors fused and packed into one matrix.
struct PackedWeight {
  std::string_view layout;
  std::vector<std::string_view> tensors;  // their rows in this order
  uint64_t rows, columns;
  std::span<const std::byte> data;     // tiles
  std::span<const std::byte> stretch;  // data and the zeros behind it, what `hash` is of
  std::string_view hash;               // XXH3-128 in hexadecimal digits
};

// XXH3-128 of a model's parts, one behind the other, in hexadecimal digits.
std::string hash_source(const gguf::GgufFile& source, const Progress& progress);

// A validated packed model that this build can use: once open() returns, all parts lie inside the
// file, and every layout is of the version that this build's kernels take. Views live as long as
// the PackedModel, also when it is moved.
class PackedModel {
 public:
  // Whether a file begins like one.
  static bool recognizes(std::span<const std::byte> bytes);

  // Throws Error: kMalformedFile (damaged, cut short), kUnsupported (another format version,
  // backend, architecture or layout version), with what was found and what is needed. Reads the
  // weights' places, not their bytes: verify() does.
  static PackedModel open(const std::filesystem::path& path);
  // The same on a file in memory, which must outlive the result.
  static PackedModel from_bytes(std::span<const std::byte> bytes, std::string name = "(in memory)");

  // The source's metadata, the tensors that are not packed, and without data those that are.
  const gguf::GgufFile& model() const { return model_; }
  std::string_view backend() const { return backend_; }
  std::string_view architecture() const { return architecture_; }
  std::string_view source_name() const { return source_name_; }
  uint64_t source_bytes() const { return source_bytes_; }
  std::string_view source_hash() const { return source_hash_; }  // XXH3-128 of all its parts
  std::span<const PackedLayout> layouts() const { return layouts_; }
  std::span<const PackedWeight> weights() const { return weights_; }
  uint64_t file_bytes() const { return bytes_.size(); }

  // The tensor's tiles; empty where it is not packed.
  std::span<const std::byte> tiles(std::string_view tensor) const;

  // The model's plan with packed segments. Throws Error(kUnsupported) where this build would fuse
  // or lay out the weights in another way.
  backend::Plan build_plan() const;

  // Compares all weights with their hashes. Throws Error(kMalformedFile) that names a damaged one.
  void verify(const Progress& progress) const;
  // Throws Error(kInvalidArgument) unless the model was packed from this file.
  void check_source(const std::filesystem::path& path, const Progress& progress) const;

 private:
  PackedModel(std::span<const std::byte> bytes, std::string name);

  std::vector<uint64_t> uints(std::string_view key, size_t size) const;
  void read_origin();
  void read_layouts();
  std::vector<gguf::Tensor> read_tensors() const;
  void read_weights(std::span<const gguf::Tensor> tensors);
  std::string again() const;

  MappedFile mapping_;
  std::string name_;
  std::span<const std::byte> bytes_;
  gguf::GgufFile model_;
  std::string_view backend_, architecture_, source_name_, source_hash_;
  uint64_t source_bytes_ = 0;
  std::vector<PackedLayout> layouts_;
  std::vector<PackedWeight> weights_;
  std::map<std::string_view, std::span<const std::byte>> tiles_;  // [tensor's name]
};

// A model in a file of either kind.
class ModelFile {
 public:
  static ModelFile open(const std::filesystem::path& path);

  const gguf::GgufFile& gguf() const { return packed_ ? packed_->model() : *gguf_; }
  const PackedModel* packed() const { return packed_ ? &*packed_ : nullptr; }
  uint64_t file_bytes() const { return packed_ ? packed_->file_bytes() : gguf_->file_bytes(); }
  backend::Plan build_plan() const;  // its views live as long as this

 private:
  std::optional<gguf::GgufFile> gguf_;
  std::optional<PackedModel> packed_;
};

}  // namespace nibble::engine
