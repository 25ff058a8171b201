#include "base/environment.h"

#include <cstdlib>

namespace nibble::environment {

std::string isa() {
  const char* value = std::getenv("NIBBLE_ISA");
  return value ? value : "";
}

}  // namespace nibble::environment
