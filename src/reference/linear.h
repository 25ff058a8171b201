#pragma once

#include <span>

#include "backend/plan.h"
#include "base/thread_pool.h"

namespace nibble::reference {

// Row `row` of the weight, exactly dequantised.
void dequantize_row(const backend::Weight& weight, uint32_t row,
                    std::span<float> values);  // [columns]

// output = input weight^T: each element a sum in double, rounded once.
void linear(ThreadPool& pool, const backend::Weight& weight,
            std::span<const float> input,  // [tokens, columns]
            std::span<float> output);      // [tokens, rows]

}  // namespace nibble::reference
