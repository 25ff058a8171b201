#include "nibble/json.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace nibble::app {
namespace {

bool is_plain(const boost::json::value& value) {
  return !value.is_object() && !value.is_array();
}

std::string line(int indent) {
  return fmt::format("\n{:{}}", "", indent);
}

}  // namespace

std::string to_text(const boost::json::value& value, int indent) {
  constexpr int kStep = 2;
  std::string text;
  if (const auto* object = value.if_object()) {
    for (const auto& [key, member] : *object) {
      text += fmt::format("{}{}{}: {}", text.empty() ? "{" : ",", line(indent + kStep),
                          boost::json::serialize(key), to_text(member, indent + kStep));
    }
    return text.empty() ? "{}" : text + line(indent) + "}";
  }
  if (const auto* array = value.if_array()) {
    const bool one_line = std::all_of(array->begin(), array->end(), is_plain);
    for (const boost::json::value& element : *array) {
      text += text.empty() ? "[" : one_line ? ", " : ",";
      if (!one_line) text += line(indent + kStep);
      text += to_text(element, indent + kStep);
    }
    if (text.empty()) return "[]";
    return text + (one_line ? "" : line(indent)) + "]";
  }
  if (value.is_double()) {
    return std::isfinite(value.as_double()) ? fmt::format("{}", value.as_double()) : "null";
  }
  return boost::json::serialize(value);
}

}  // namespace nibble::app
