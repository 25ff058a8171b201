#pragma once

#include <memory>

#include "backend/backend.h"

namespace nibble::reference {

// Runs plans plainly: f32 activations, exactly dequantised weights, the KV format asked for, one
// loop per formula. What every other backend is tested against; speed is no concern beyond a pool
// of threads over independent outputs.
std::unique_ptr<backend::Backend> make_reference_backend(const backend::Plan& plan,
                                                         const backend::BackendOptions& options);

}  // namespace nibble::reference
