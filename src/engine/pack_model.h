#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "base/progress.h"

namespace nibble::engine {

struct PackOptions {
  std::string backend = "cuda";
  uint32_t threads = 0;  // 0: one per core
};

// Writes the GGUF model `source` as a packed model; needs no device. The file appears under its
// name when it is whole, and nothing is left behind after an error. Throws Error: kIo (no room,
// with bytes needed and free; a file OUTPUT.partial is in the way), kInvalidArgument (`source` is
// packed already, or `output` is a part of it), kUnsupported (another backend; a model that this
// build does not run); and what `progress` throws to end it.
void pack_model(const std::filesystem::path& source, const std::filesystem::path& output,
                const PackOptions& options, const Progress& progress = {});

}  // namespace nibble::engine
