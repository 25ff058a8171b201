#pragma once
// Products with weight matrices that stay in GGUF's blocks, where the file's mapping has them.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "backend/plan.h"
#include "base/thread_pool.h"
#include "cpu/isa.h"

namespace nibble::cpu {

// y = x W^T, with the kernels of one instruction set.
//
// Against Q4_K, Q5_K, Q6_K, Q8_0 and Q4_0, x is rounded to 8 bits with one f32 scale per 32 values;
// against all other types it stays f32. Sums are f32. Each segment of a fused weight has its own
// type and goes its own way.
//
// A row of y depends on its row of x and on the instruction set only: not on the number of threads,
// nor, to the last bit, on how many rows run together. NaN and infinity in a row of x make no
// finite sums of that row; in a block of the weight they change that output and no other.
class Linear {
 public:
  // Takes all memory that runs of up to `max_rows` rows of up to `max_columns` need.
  Linear(Isa isa, ThreadPool& pool, uint32_t max_rows, uint32_t max_columns);
  ~Linear();
  Linear(const Linear&) = delete;
  Linear& operator=(const Linear&) = delete;

  void run(const backend::Weight& weight,
           const float* x,  // [rows, weight.columns]
           size_t rows,
           float* y);  // [rows, weight.rows()]; must not overlap x

  uint64_t workspace_bytes() const;

 private:
  struct Workspace;
  std::unique_ptr<Workspace> workspace_;
};

// Row `row` of `weight`, dequantised exactly.
void gather_row(const backend::Weight& weight, uint32_t row,
                float* out);  // [weight.columns]

}  // namespace nibble::cpu
