#pragma once

#include <cstdint>
#include <functional>
#include <string_view>

namespace nibble {

// Called now and then during long work, from the thread that asked for it: what is being done, and
// how much of `total` (bytes, tokens, ...) is behind us. An empty function is allowed and means
// that nobody looks.
using Progress = std::function<void(std::string_view what, uint64_t done, uint64_t total)>;

}  // namespace nibble
