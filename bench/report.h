#pragma once
// Results of a benchmark as JSON, beside the table that it prints.

#include <cstdint>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace nibble::bench {

using Field = std::variant<uint32_t, double, std::string>;
using Point = std::vector<std::pair<std::string, Field>>;

class Report {
 public:
  // Takes "--json FILE" out of the program's arguments; without it nothing is written.
  void take_path(int& count, char** arguments);

  void add(Point point) { points_.push_back(std::move(point)); }
  // {"device": ..., "commit": ..., "points": [...]}. Says why and returns 1 if that fails, else 0.
  int write(const std::string& device) const;

 private:
  std::string path_;
  std::vector<Point> points_;
};

}  // namespace nibble::bench
