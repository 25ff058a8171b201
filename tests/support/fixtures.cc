#include "support/fixtures.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

namespace nibble::test {
namespace {

template <class T>
std::vector<T> read_array(const std::filesystem::path& path) {
  const std::string bytes = read_file(path);
  std::vector<T> values(bytes.size() / sizeof(T));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(T));
  return values;
}

}  // namespace

std::filesystem::path fixture(std::string_view name) {
  return std::filesystem::path(NIBBLE_FIXTURES) / name;
}

std::filesystem::path bundled_model(std::string_view name) {
  return std::filesystem::path(NIBBLE_BUNDLED_MODELS) / name;
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error("can't read " + path.string());
  return {std::istreambuf_iterator<char>(stream), {}};
}

std::vector<float> read_f32(const std::filesystem::path& path) {
  return read_array<float>(path);
}
std::vector<int32_t> read_i32(const std::filesystem::path& path) {
  return read_array<int32_t>(path);
}

}  // namespace nibble::test
