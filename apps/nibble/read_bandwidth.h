#pragma once

#include <cstdint>

namespace nibble::app {

// Bytes per second at which `threads` threads read memory with nothing else to do: the best of
// several passes over a buffer much larger than the caches. What decoding is measured against.
double measure_read_bandwidth(uint32_t threads);

}  // namespace nibble::app
