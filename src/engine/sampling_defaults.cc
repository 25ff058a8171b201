#include "engine/sampling_defaults.h"

#include <algorithm>
#include <limits>

#include "base/error.h"

namespace nibble::engine {
namespace {

// Files write 0 or a negative number for "off".
uint32_t top_k(const gguf::GgufFile& file, uint32_t otherwise) {
  const gguf::Metadata* entry = file.find("general.sampling.top_k");
  if (entry == nullptr) return otherwise;
  if (const auto* number = std::get_if<int64_t>(&entry->value); number != nullptr && *number < 0) {
    return 0;
  }
  const uint64_t number = file.require_uint("general.sampling.top_k");
  return static_cast<uint32_t>(std::min<uint64_t>(number, std::numeric_limits<uint32_t>::max()));
}

}  // namespace

backend::SamplingParams sampling_defaults(const gguf::GgufFile& file) {
  backend::SamplingParams params;
  const auto number = [&](const char* key, double otherwise) {
    return static_cast<float>(file.find_float(key).value_or(otherwise));
  };
  params.temperature = number("general.sampling.temp", 1.0);
  params.top_k = top_k(file, 64);
  params.top_p = number("general.sampling.top_p", 0.95);
  params.min_p = number("general.sampling.min_p", params.min_p);
  params.repetition_penalty = number("general.sampling.penalty_repeat", params.repetition_penalty);
  try {
    params.validate(std::numeric_limits<uint32_t>::max());
  } catch (const Error& error) {
    fail(ErrorCode::kMalformedFile, "the file's general.sampling.* are wrong: {}", error.what());
  }
  return params;
}

}  // namespace nibble::engine
