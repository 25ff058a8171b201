#pragma once
// Writes small GGUF files for tests, right ones and every kind of wrong one.
//
//   GgufBuilder file;
//   file.string("general.architecture", "gemma4").u32("gemma4.block_count", 2);
//   file.f32_tensor("output_norm.weight", {4}, {1, 1, 1, 1});
//   const std::vector<std::byte> bytes = file.build();
//
// What the methods write is well-formed; the public fields replace what would be written, so that a
// test can lie about one thing at a time.

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "quant/quant_type.h"

namespace nibble::test {

class GgufBuilder {
 public:
  struct Tensor {
    std::string name;
    uint32_t type;
    std::vector<uint64_t> dimensions;  // innermost first
    std::vector<std::byte> data;       // may be shorter or longer than type and dimensions say
    std::optional<uint32_t> dimension_count;  // instead of dimensions.size()
    std::optional<uint64_t> offset;           // instead of the next aligned one
  };

  std::string magic = "GGUF";
  uint32_t version = 3;
  uint64_t alignment = 32;  // as the data is laid out; write "general.alignment" to say another
  std::optional<uint64_t> metadata_count;  // instead of the number of keys
  std::optional<uint64_t> tensor_count;    // instead of the number of tensors
  std::vector<Tensor> tensors;

  // Metadata, in the order of the calls. A key may be written twice.
  GgufBuilder& u8(std::string_view key, uint8_t value);
  GgufBuilder& i8(std::string_view key, int8_t value);
  GgufBuilder& u16(std::string_view key, uint16_t value);
  GgufBuilder& i16(std::string_view key, int16_t value);
  GgufBuilder& u32(std::string_view key, uint32_t value);
  GgufBuilder& i32(std::string_view key, int32_t value);
  GgufBuilder& u64(std::string_view key, uint64_t value);
  GgufBuilder& i64(std::string_view key, int64_t value);
  GgufBuilder& f32(std::string_view key, float value);
  GgufBuilder& f64(std::string_view key, double value);
  GgufBuilder& boolean(std::string_view key, bool value);
  GgufBuilder& string(std::string_view key, std::string_view value);
  GgufBuilder& u8_array(std::string_view key, const std::vector<uint8_t>& values);
  GgufBuilder& i8_array(std::string_view key, const std::vector<int8_t>& values);
  GgufBuilder& u16_array(std::string_view key, const std::vector<uint16_t>& values);
  GgufBuilder& i16_array(std::string_view key, const std::vector<int16_t>& values);
  GgufBuilder& u32_array(std::string_view key, const std::vector<uint32_t>& values);
  GgufBuilder& i32_array(std::string_view key, const std::vector<int32_t>& values);
  GgufBuilder& u64_array(std::string_view key, const std::vector<uint64_t>& values);
  GgufBuilder& i64_array(std::string_view key, const std::vector<int64_t>& values);
  GgufBuilder& f32_array(std::string_view key, const std::vector<float>& values);
  GgufBuilder& f64_array(std::string_view key, const std::vector<double>& values);
  GgufBuilder& bool_array(std::string_view key, const std::vector<bool>& values);
  GgufBuilder& string_array(std::string_view key, const std::vector<std::string>& values);
  // Any type number followed by any bytes.
  GgufBuilder& raw(std::string_view key, uint32_t value_type, std::string_view value);

  // A tensor of `data`; without any, of zero bytes, as many as type and dimensions need.
  GgufBuilder& tensor(std::string_view name, quant::QuantType type,
                      std::vector<uint64_t> dimensions, std::vector<std::byte> data = {});
  GgufBuilder& f32_tensor(std::string_view name, std::vector<uint64_t> dimensions,
                          const std::vector<float>& values);

  std::vector<std::byte> build() const;
  void write(const std::filesystem::path& path) const;

 private:
  template <class T>
  GgufBuilder& scalar(std::string_view key, uint32_t type, T value);
  template <class T>
  GgufBuilder& array(std::string_view key, uint32_t type, const std::vector<T>& values);

  std::string metadata_;  // as it will lie in the file
  uint64_t keys_ = 0;
};

// `value` as it lies in a file, for raw(): little-endian; a string is its length and its bytes.
std::string gguf_u32(uint32_t value);
std::string gguf_u64(uint64_t value);
std::string gguf_string(std::string_view value);

}  // namespace nibble::test
