#pragma once

#include "backend/sampling.h"
#include "gguf/gguf_file.h"

namespace nibble::engine {

// What the file recommends in `general.sampling.*`; for keys that it lacks, temperature 1,
// top-k 64, top-p 0.95. Throws Error(kMalformedFile) on values out of range.
backend::SamplingParams sampling_defaults(const gguf::GgufFile& file);

}  // namespace nibble::engine
