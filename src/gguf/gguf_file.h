#pragma once
// GGUF model files, versions 2 and 3, little-endian, memory-mapped, single or split.
// Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "base/mapped_file.h"
#include "quant/quant_type.h"

namespace nibble::gguf {

enum class ValueType : uint32_t {
  kUint8 = 0,
  kInt8 = 1,
  kUint16 = 2,
  kInt16 = 3,
  kUint32 = 4,
  kInt32 = 5,
  kFloat32 = 6,
  kBool = 7,
  kString = 8,
  kArray = 9,
  kUint64 = 10,
  kInt64 = 11,
  kFloat64 = 12,
};
std::string_view to_string(ValueType type);

// An array as it lies in the file. Elements are read by GgufFile's typed accessors.
struct Array {
  ValueType element_type;
  uint64_t count;
  std::span<const std::byte> data;  // `count` elements, checked to be whole
};

// Integers are widened to 64 bits, floats to double; `Metadata::type` keeps the file's type.
using Value = std::variant<uint64_t, int64_t, double, bool, std::string_view, Array>;

struct Metadata {
  std::string_view key;
  ValueType type;
  Value value;
};

struct Tensor {
  std::string_view name;
  quant::QuantType type;
  std::vector<uint64_t> dimensions;  // innermost first, 1 to 4 of them, none zero
  std::span<const std::byte> data;   // the tensor's bytes, exactly

  uint64_t columns() const { return dimensions[0]; }  // the innermost: values in a row
  uint64_t rows() const {
    uint64_t product = 1;
    for (size_t i = 1; i < dimensions.size(); ++i) product *= dimensions[i];
    return product;
  }
};

// A validated file. Once open() returns, every name, array and tensor lies inside the mapping, no
// tensors overlap or share a name, and no size can overflow. Views point into the mapping and live
// as long as the GgufFile, also when it is moved.
class GgufFile {
 public:
  // Opens `path` and, for a split file ("-00001-of-00003.gguf"), its other parts.
  // Throws Error: kIo, kMalformedFile (what was found, expected, at which byte), kUnsupported
  // (version 1, big-endian, an unknown tensor type, an array of arrays).
  static GgufFile open(const std::filesystem::path& path);
  // The same checks on one part in memory, called `name` in messages. `bytes` must outlive the
  // result.
  static GgufFile from_bytes(std::span<const std::byte> bytes, std::string name = "(in memory)");

  // Joins tensors whose bytes are kept elsewhere: named and described here, without data. Throws
  // Error(kMalformedFile) on a name that is there already. Names must live as long as this.
  void describe_tensors(std::vector<Tensor> tensors);

  uint32_t version() const { return version_; }
  uint64_t file_bytes() const { return file_bytes_; }           // of all parts
  std::span<const MappedFile> parts() const { return parts_; }  // none when read from memory
  std::span<const Metadata> metadata() const { return metadata_; }
  // All keys and values as they lie in the file, one behind the other.
  std::span<const std::byte> metadata_bytes() const { return metadata_bytes_; }
  std::span<const Tensor> tensors() const { return tensors_; }

  const Metadata* find(std::string_view key) const;        // nullptr when absent
  const Tensor* find_tensor(std::string_view name) const;  // nullptr when absent

  // Typed access. Absent: nullopt. Another type, or a value out of range: Error(kMalformedFile)
  // that names key, found and expected. An empty array suits every element type.
  std::optional<uint64_t> find_uint(std::string_view key) const;  // any integer type, not negative
  std::optional<double> find_float(std::string_view key) const;   // f32 or f64
  std::optional<bool> find_bool(std::string_view key) const;
  std::optional<std::string_view> find_string(std::string_view key) const;
  std::optional<std::vector<uint64_t>> find_uint_array(std::string_view key) const;
  std::optional<std::vector<int64_t>> find_int_array(std::string_view key) const;
  std::optional<std::vector<float>> find_float_array(std::string_view key) const;
  std::optional<std::vector<bool>> find_bool_array(std::string_view key) const;
  std::optional<std::vector<std::string_view>> find_string_array(std::string_view key) const;

  // The same, but absence is an error too.
  uint64_t require_uint(std::string_view key) const;
  double require_float(std::string_view key) const;
  std::string_view require_string(std::string_view key) const;

 private:
  GgufFile() = default;

  // One file or one part of a split one; `name` stands in messages.
  static GgufFile read(std::span<const std::byte> bytes, std::string name);
  static GgufFile open_part(const std::filesystem::path& path);
  void append(GgufFile part);
  void index_joined_tensors();

  template <class T>
  std::optional<T> find_scalar(std::string_view key, std::string_view expected,
                               std::optional<T> (*convert)(const Value&)) const;
  template <class T>
  std::optional<std::vector<T>> find_array(std::string_view key, std::string_view expected,
                                           std::optional<T> (*convert)(const Value&)) const;
  void expect_uint(std::string_view key, uint64_t expected) const;
  [[noreturn]] void fail_value(const Metadata& metadata, std::string_view expected) const;

  std::vector<MappedFile> parts_;
  std::string name_;
  std::span<const std::byte> first_part_;  // the one with the metadata
  std::span<const std::byte> metadata_bytes_;
  uint64_t file_bytes_ = 0;
  uint32_t version_ = 0;
  std::vector<Metadata> metadata_;
  std::vector<Tensor> tensors_;
  // Pointers into the two vectors, in the order of the names.
  std::vector<const Metadata*> metadata_by_key_;
  std::vector<const Tensor*> tensors_by_name_;
};

}  // namespace nibble::gguf
