#include "cpu/isa.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <string>
#include <vector>

#include "base/environment.h"
#include "base/error.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace nibble::cpu {
namespace {

std::vector<Isa> detect() {
  std::vector<Isa> found = {Isa::kScalar};
#if defined(__x86_64__)
  // These also ask whether the operating system saves the wide registers. F16C, which clang's
  // builtin does not know, is older than AVX2 and in every processor that has it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(Isa::kAvx2);
  }
  if (found.back() == Isa::kAvx2 && __builtin_cpu_supports("avx512f") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")) {
    found.push_back(Isa::kAvx512);
  }
#elif defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(Isa::kNeon);
#elif defined(__aarch64__) && defined(__APPLE__)
  found.push_back(Isa::kNeon);  // every Apple core since the M1 has the dot product
#endif
  return found;
}

}  // namespace

std::string_view isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kNeon:
      return "neon";
  }
  return {};
}

std::span<const Isa> available_isas() {
  static const std::vector<Isa> isas = detect();
  return isas;
}

Isa choose_isa(std::string_view wanted) {
  const std::span<const Isa> isas = available_isas();
  if (wanted.empty()) return isas.back();
  const auto found = std::ranges::find_if(isas, [&](Isa isa) { return isa_name(isa) == wanted; });
  if (found != isas.end()) return *found;

  std::vector<std::string_view> names;
  for (Isa isa : isas) names.push_back(isa_name(isa));
  fail(ErrorCode::kInvalidArgument,
       "NIBBLE_ISA asks for \"{}\", but this machine has: {}. Choose one of these, or unset it to "
       "use the best.",
       wanted, fmt::join(names, ", "));
}

Isa default_isa() {
  return choose_isa(environment::isa());
}

}  // namespace nibble::cpu
