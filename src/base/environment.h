#pragma once
// The only place where environment variables are read. All are diagnostic: none changes a result
// beyond rounding, and none is needed to use Nibble.

#include <string>

namespace nibble::environment {

// NIBBLE_ISA: the instruction set that the CPU kernels must use ("scalar", "avx2", "avx512",
// "neon"). Empty: the best that the machine has. One that the machine lacks is an error.
std::string isa();

}  // namespace nibble::environment
