#include "support/gguf_builder.h"

#include <fstream>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace nibble::test {
namespace {

// Value types by their numbers in the file, written out so that the tests don't lean on the reader.
enum : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64
};

template <class T>
std::string bytes_of(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

}  // namespace

std::string gguf_u32(uint32_t value) {
  return bytes_of(value);
}
std::string gguf_u64(uint64_t value) {
  return bytes_of(value);
}
std::string gguf_string(std::string_view value) {
  return gguf_u64(value.size()).append(value);
}

GgufBuilder& GgufBuilder::raw(std::string_view key, uint32_t value_type, std::string_view value) {
  metadata_.append(gguf_string(key)).append(gguf_u32(value_type)).append(value);
  ++keys_;
  return *this;
}

template <class T>
GgufBuilder& GgufBuilder::scalar(std::string_view key, uint32_t type, T value) {
  return raw(key, type, bytes_of(value));
}

template <class T>
GgufBuilder& GgufBuilder::array(std::string_view key, uint32_t type, const std::vector<T>& values) {
  std::string bytes = gguf_u32(type) + gguf_u64(values.size());
  for (const T& value : values) {
    if constexpr (std::is_same_v<T, std::string>) {
      bytes += gguf_string(value);
    } else {
      bytes += bytes_of(value);
    }
  }
  return raw(key, kArray, bytes);
}

GgufBuilder& GgufBuilder::u8(std::string_view key, uint8_t value) {
  return scalar(key, kU8, value);
}
GgufBuilder& GgufBuilder::i8(std::string_view key, int8_t value) {
  return scalar(key, kI8, value);
}
GgufBuilder& GgufBuilder::u16(std::string_view key, uint16_t value) {
  return scalar(key, kU16, value);
}
GgufBuilder& GgufBuilder::i16(std::string_view key, int16_t value) {
  return scalar(key, kI16, value);
}
GgufBuilder& GgufBuilder::u32(std::string_view key, uint32_t value) {
  return scalar(key, kU32, value);
}
GgufBuilder& GgufBuilder::i32(std::string_view key, int32_t value) {
  return scalar(key, kI32, value);
}
GgufBuilder& GgufBuilder::u64(std::string_view key, uint64_t value) {
  return scalar(key, kU64, value);
}
GgufBuilder& GgufBuilder::i64(std::string_view key, int64_t value) {
  return scalar(key, kI64, value);
}
GgufBuilder& GgufBuilder::f32(std::string_view key, float value) {
  return scalar(key, kF32, value);
}
GgufBuilder& GgufBuilder::f64(std::string_view key, double value) {
  return scalar(key, kF64, value);
}
GgufBuilder& GgufBuilder::boolean(std::string_view key, bool value) {
  return scalar(key, kBool, uint8_t(value));
}
GgufBuilder& GgufBuilder::string(std::string_view key, std::string_view value) {
  return raw(key, kString, gguf_string(value));
}

GgufBuilder& GgufBuilder::u8_array(std::string_view key, const std::vector<uint8_t>& values) {
  return array(key, kU8, values);
}
GgufBuilder& GgufBuilder::i8_array(std::string_view key, const std::vector<int8_t>& values) {
  return array(key, kI8, values);
}
GgufBuilder& GgufBuilder::u16_array(std::string_view key, const std::vector<uint16_t>& values) {
  return array(key, kU16, values);
}
GgufBuilder& GgufBuilder::i16_array(std::string_view key, const std::vector<int16_t>& values) {
  return array(key, kI16, values);
}
GgufBuilder& GgufBuilder::u32_array(std::string_view key, const std::vector<uint32_t>& values) {
  return array(key, kU32, values);
}
GgufBuilder& GgufBuilder::i32_array(std::string_view key, const std::vector<int32_t>& values) {
  return array(key, kI32, values);
}
GgufBuilder& GgufBuilder::u64_array(std::string_view key, const std::vector<uint64_t>& values) {
  return array(key, kU64, values);
}
GgufBuilder& GgufBuilder::i64_array(std::string_view key, const std::vector<int64_t>& values) {
  return array(key, kI64, values);
}
GgufBuilder& GgufBuilder::f32_array(std::string_view key, const std::vector<float>& values) {
  return array(key, kF32, values);
}
GgufBuilder& GgufBuilder::f64_array(std::string_view key, const std::vector<double>& values) {
  return array(key, kF64, values);
}
GgufBuilder& GgufBuilder::bool_array(std::string_view key, const std::vector<bool>& values) {
  return array(key, kBool, std::vector<uint8_t>(values.begin(), values.end()));
}
GgufBuilder& GgufBuilder::string_array(std::string_view key,
                                       const std::vector<std::string>& values) {
  return array(key, kString, values);
}

GgufBuilder& GgufBuilder::tensor(std::string_view name, quant::QuantType type,
                                 std::vector<uint64_t> dimensions, std::vector<std::byte> data) {
  if (data.empty()) {
    uint64_t bytes = quant::row_bytes(type, dimensions.at(0));
    for (size_t i = 1; i < dimensions.size(); ++i) bytes *= dimensions[i];
    data.resize(bytes);
  }
  tensors.push_back({std::string(name), uint32_t(type), std::move(dimensions), std::move(data),
                     std::nullopt, std::nullopt});
  return *this;
}

GgufBuilder& GgufBuilder::f32_tensor(std::string_view name, std::vector<uint64_t> dimensions,
                                     const std::vector<float>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return tensor(name, quant::QuantType::kF32, std::move(dimensions), {bytes.begin(), bytes.end()});
}

std::vector<std::byte> GgufBuilder::build() const {
  std::string file = magic;
  file += bytes_of(version);
  file += bytes_of(tensor_count.value_or(tensors.size()));
  file += bytes_of(metadata_count.value_or(keys_));
  file += metadata_;

  std::string data;
  const auto pad = [this](std::string& bytes) {
    bytes.resize((bytes.size() + alignment - 1) / alignment * alignment);
  };
  for (const Tensor& tensor : tensors) {
    pad(data);
    file += gguf_string(tensor.name);
    file += bytes_of(tensor.dimension_count.value_or(uint32_t(tensor.dimensions.size())));
    for (const uint64_t dimension : tensor.dimensions) file += bytes_of(dimension);
    file += bytes_of(tensor.type);
    file += bytes_of(tensor.offset.value_or(data.size()));
    data.append(reinterpret_cast<const char*>(tensor.data.data()), tensor.data.size());
  }
  if (!tensors.empty()) pad(file);
  file += data;
  const auto bytes = std::as_bytes(std::span(file));
  return {bytes.begin(), bytes.end()};
}

void GgufBuilder::write(const std::filesystem::path& path) const {
  const std::vector<std::byte> bytes = build();
  std::ofstream stream(path, std::ios::binary);
  stream.write(reinterpret_cast<const char*>(bytes.data()), std::streamsize(bytes.size()));
  if (!stream.flush()) throw std::runtime_error("can't write " + path.string());
}

}  // namespace nibble::test
