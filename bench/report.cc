#include "report.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <string_view>

namespace nibble::bench {
namespace {

// Names and texts are our own and need no escapes.
std::string to_json(const Field& field) {
  if (const auto* text = std::get_if<std::string>(&field)) return '"' + *text + '"';
  if (const auto* count = std::get_if<uint32_t>(&field)) return std::to_string(*count);
  char number[32];
  std::snprintf(number, sizeof number, "%.6g", std::get<double>(field));
  return number;
}

}  // namespace

void Report::take_path(int& count, char** arguments) {
  for (int i = 1; i + 1 < count; ++i) {
    if (std::string_view(arguments[i]) != "--json") continue;
    path_ = arguments[i + 1];
    std::copy(arguments + i + 2, arguments + count, arguments + i);
    count -= 2;
    return;
  }
}

int Report::write(const std::string& device) const {
  if (path_.empty()) return 0;
  std::ofstream out(path_);
  out << "{\n  \"device\": \"" << device << "\",\n  \"commit\": \"" << NIBBLE_COMMIT
      << "\",\n  \"points\": [";
  const char* before_point = "\n";
  for (const Point& point : points_) {
    out << before_point << "    {";
    const char* before_field = "";
    for (const auto& [name, field] : point) {
      out << before_field << '"' << name << "\": " << to_json(field);
      before_field = ", ";
    }
    out << '}';
    before_point = ",\n";
  }
  out << "\n  ]\n}\n";
  out.close();
  if (out) return 0;
  std::fprintf(stderr, "%s: can't write\n", path_.c_str());
  return 1;
}

}  // namespace nibble::bench
