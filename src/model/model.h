#pragma once
// From a validated GGUF to a plan.

#include "backend/plan.h"
#include "gguf/gguf_file.h"

namespace nibble::model {

// Builds the plan of the file's architecture. Checks every hyper-parameter against the tensors'
// shapes before anything is allocated. `file` must outlive the plan. Throws Error:
// kMalformedFile names key or tensor, found and expected; kUnsupported names what is not run yet
// (another architecture, per-layer embeddings, shared KV layers, experts) and lists what is.
backend::Plan build_plan(const gguf::GgufFile& file);

}  // namespace nibble::model
