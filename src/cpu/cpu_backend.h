#pragma once

#include <memory>

#include "backend/backend.h"
#include "backend/kv_codec.h"

namespace nibble::cpu {

// Runs plans on the machine's cores, with the kernels of the best instruction set that it has
// (src/cpu/isa.h). Weights are read where the file's mapping has them; `plan` and the mapping
// must outlive the backend. Throws Error(kInvalidArgument) when NIBBLE_ISA asks for what the
// machine lacks.
std::unique_ptr<backend::Backend> make_cpu_backend(const backend::Plan& plan,
                                                   const backend::BackendOptions& options);

// The same for tests of KV formats.
std::unique_ptr<backend::Backend> make_cpu_backend_with(const backend::Plan& plan,
                                                        const backend::BackendOptions& options,
                                                        backend::ChangeKvRow change);

}  // namespace nibble::cpu
