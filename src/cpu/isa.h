#pragma once
// Which instruction set the CPU kernels use: the one place that decides it.

#include <cstdint>
#include <span>
#include <string_view>

namespace nibble::cpu {

enum class Isa : uint8_t {
  kScalar,  // portable C++, any machine
  kAvx2,    // x86-64 with AVX2, FMA and F16C
  kAvx512,  // x86-64 with AVX-512 F, BW, DQ, VL and VNNI
  kNeon,    // AArch64 with the dot product extension
};

std::string_view isa_name(Isa isa);  // "scalar", "avx2", "avx512", "neon"

// What this machine can run, best last; never empty, since kScalar runs everywhere.
std::span<const Isa> available_isas();

// The instruction set named `wanted`, or the best one when it is empty. Throws
// Error(kInvalidArgument), naming what the machine has, for one that it lacks or that is none.
Isa choose_isa(std::string_view wanted);

// choose_isa(environment::isa()): what everybody but tests should ask.
Isa default_isa();

}  // namespace nibble::cpu
