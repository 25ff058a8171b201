#include "nibble/lists.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>

namespace nibble::app {
namespace {

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

std::vector<uint32_t> parse_counts(std::string_view option, std::string_view text) {
  const std::vector<int32_t> numbers = parse_numbers(option, text, 1);
  return {numbers.begin(), numbers.end()};
}

std::vector<TokenId> parse_ids(std::string_view text) {
  std::vector<TokenId> ids;
  for (const int32_t number : parse_numbers("--ids", text, 0)) ids.push_back({number});
  return ids;
}

uint32_t logit_rows_at_once(const engine::Engine& engine) {
  constexpr uint64_t kMaxBytes = 256'000'000;
  const uint64_t row_bytes = uint64_t{engine.plan().vocabulary} * sizeof(float);
  return uint32_t(std::max<uint64_t>(1, kMaxBytes / row_bytes));
}

}  // namespace nibble::app
