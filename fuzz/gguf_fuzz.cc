// The file reader: any bytes give an Error or a file of which every part can be read.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/error.h"
#include "gguf/gguf_file.h"

namespace {

using nibble::gguf::GgufFile;

// Keeps a read from being optimised away.
template <class T>
void use(const T& value) {
  asm volatile("" : : "r"(&value) : "memory");
}

// Most accessors refuse most keys; what they accept must be readable.
template <class Access>
void attempt(Access access) {
  try {
    use(access());
  } catch (const nibble::Error&) {
  }
}

void read_metadata(const GgufFile& file) {
  for (const auto& metadata : file.metadata()) {
    const std::string_view key = metadata.key;
    if (file.find(key) == nullptr) __builtin_trap();
    attempt([&] { return file.require_uint(key); });
    attempt([&] { return file.require_float(key); });
    attempt([&] { return file.find_bool(key); });
    attempt([&] { return std::string(file.require_string(key)); });
    attempt([&] { return file.find_uint_array(key); });
    attempt([&] { return file.find_int_array(key); });
    attempt([&] { return file.find_float_array(key); });
    attempt([&] { return file.find_bool_array(key); });
    attempt([&] {
      size_t bytes = 0;
      const auto strings = file.find_string_array(key);
      for (const std::string_view text : *strings) bytes += std::string(text).size();
      return bytes;
    });
  }
}

void read_tensors(const GgufFile& file) {
  for (const auto& tensor : file.tensors()) {
    if (file.find_tensor(tensor.name) != &tensor) __builtin_trap();
    if (nibble::quant::row_bytes(tensor.type, tensor.columns()) * tensor.rows() !=
        tensor.data.size()) {
      __builtin_trap();
    }
    use(std::byte(tensor.data.front()));
    use(std::byte(tensor.data.back()));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const GgufFile file = GgufFile::from_bytes(std::as_bytes(std::span(data, size)));
    read_metadata(file);
    read_tensors(file);
  } catch (const nibble::Error&) {
  }
  return 0;
}
