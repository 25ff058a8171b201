#include "nibble/input.h"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <memory>

#include "base/error.h"

namespace nibble::app {
namespace {

// More than any context holds; /dev/zero has no end.
constexpr size_t kMostBytes = size_t{256} << 20;

// `name` is for the message.
std::string read_all(std::FILE* file, std::string_view name) {
  std::string text;
  char buffer[65536];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, file)) {
    text.append(buffer, count);
    if (text.size() > kMostBytes) {
      fail(ErrorCode::kInvalidArgument, "{}: more than {} MiB; expected a text", name,
           kMostBytes >> 20);
    }
  }
  if (std::ferror(file)) fail(ErrorCode::kIo, "{}: can't read: {}", name, strerror(errno));
  return text;
}

// The parts between commas as numbers of at least `low`.
std::vector<int32_t> parse_numbers(std::string_view option, std::string_view text, int32_t low) {
  std::vector<int32_t> numbers;
  while (true) {
    const size_t comma = std::min(text.find(','), text.size());
    const std::string_view part = text.substr(0, comma);
    int32_t number;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    if (error != std::errc() || end != part.data() + part.size() || number < low) {
      throw CLI::ValidationError(
          std::string(option),
          "\"" + std::string(part) + "\" is not a whole number of at least " + std::to_string(low));
    }
    numbers.push_back(number);
    if (comma == text.size()) return numbers;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace

bool stdin_is_terminal() {
  return ::isatty(STDIN_FILENO) == 1;
}

std::string read_stdin() {
  return read_all(stdin, "stdin");
}

std::string read_file(const std::string& path) {
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(path.c_str(), "rb"),
                                                             &std::fclose);
  if (!file) fail(ErrorCode::kIo, "{}: can't open: {}", path, strerror(errno));
  return read_all(file.get(), path);
}

std::vector<uint32_t> parse_counts(std::string_view option, std::string_view text) {
  const std::vector<int32_t> numbers = parse_numbers(option, text, 1);
  return {numbers.begin(), numbers.end()};
}

std::vector<TokenId> parse_ids(std::string_view text) {
  std::vector<TokenId> ids;
  for (const int32_t number : parse_numbers("--ids", text, 0)) ids.push_back({number});
  return ids;
}

}  // namespace nibble::app
