#pragma once
// Where the tests' data lies, and how it is read.

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace nibble::test {

std::filesystem::path fixture(std::string_view name);        // "models/micro-gemma4-f16.gguf"
std::filesystem::path bundled_model(std::string_view name);  // "tiny-gemma4-Q4_K_M.gguf"

std::string read_file(const std::filesystem::path& path);  // throws when it can't be read
std::vector<float> read_f32(const std::filesystem::path& path);
std::vector<int32_t> read_i32(const std::filesystem::path& path);

}  // namespace nibble::test
