#include "backend/plan.h"

#include <set>

namespace nibble::backend {

std::string_view to_string(WeightStorage storage) {
  return storage == WeightStorage::kDirect ? "direct" : "packed";
}

uint32_t Weight::rows() const {
  uint32_t total = 0;
  for (const WeightSegment& segment : segments) total += segment.rows;
  return total;
}

uint64_t Weight::bytes() const {
  uint64_t total = 0;
  for (const WeightSegment& segment : segments) total += segment.data.size();
  return total;
}

std::string_view step_name(const Step& step) {
  constexpr std::string_view kNames[] = {"Embed",   "NormQkv",  "Attend",
                                         "Project", "GatedMlp", "Logits"};
  static_assert(std::size(kNames) == std::variant_size_v<Step>);
  return kNames[step.index()];
}

uint64_t Plan::weight_bytes() const {
  std::set<const std::byte*> seen;
  uint64_t total = 0;
  for (const Weight& weight : weights) {
    for (const WeightSegment& segment : weight.segments) {
      if (seen.insert(segment.data.data()).second) total += segment.data.size();
    }
  }
  return total;
}

}  // namespace nibble::backend
