#include "model/model.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>

#include "base/error.h"
#include "model/gemma4.h"

namespace nibble::model {
namespace {

struct Architecture {
  std::string_view name;  // general.architecture
  backend::Plan (*build)(const gguf::GgufFile&);
};

constexpr std::array kArchitectures = {Architecture{"gemma4", build_gemma4}};

}  // namespace

backend::Plan build_plan(const gguf::GgufFile& file) {
  const std::string_view name = file.require_string("general.architecture");
  const auto found = std::find_if(kArchitectures.begin(), kArchitectures.end(),
                                  [&](const Architecture& a) { return a.name == name; });
  if (found == kArchitectures.end()) {
    std::vector<std::string_view> supported;
    for (const Architecture& architecture : kArchitectures) supported.push_back(architecture.name);
    fail(ErrorCode::kUnsupported,
         "general.architecture is \"{}\", which this build can't run; it runs: {}", name,
         fmt::join(supported, ", "));
  }
  backend::Plan plan = found->build(file);
  plan.architecture = name;
  return plan;
}

}  // namespace nibble::model
