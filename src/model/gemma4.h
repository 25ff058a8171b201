#pragma once

#include "backend/plan.h"
#include "gguf/gguf_file.h"

namespace nibble::model {

// The dense Gemma 4 models (31B and its likes). Source of the formulas: the public reference
// implementation (Gemma4ForCausalLM in Hugging Face transformers).
backend::Plan build_gemma4(const gguf::GgufFile& file);

}  // namespace nibble::model
