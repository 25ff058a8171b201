#pragma once
// The built binary, and models for it.

#include <string>
#include <vector>

#include "support/fixtures.h"
#include "support/process.h"

namespace nibble::test {

inline Outcome nibble(std::vector<std::string> arguments, std::string_view input = {},
                      double seconds = 120) {
  arguments.insert(arguments.begin(), NIBBLE_BINARY);
  return run_program(arguments, input, seconds);
}

inline std::string micro(const std::string& type) {
  return fixture("models/micro-gemma4-" + type + ".gguf").string();
}

inline std::string tiny() {
  return bundled_model("tiny-gemma4-Q4_K_M.gguf").string();
}

}  // namespace nibble::test
