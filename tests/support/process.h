#pragma once
// Programs run as a user runs them.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace nibble::test {

// Whether this build has the address sanitizer, under which address space can't be limited.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline constexpr bool kSanitized = true;
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif
#else
inline constexpr bool kSanitized = false;
#endif

// What a correct run may take: 6 GB, and some seconds (more under sanitizers).
inline constexpr uint64_t kMemoryLimitBytes = uint64_t{6} << 30;

struct Outcome {
  int exit_code = -1;  // -1: it was killed
  int signal = 0;      // that killed it
  bool timed_out = false;
  std::string out, err;
};

// Runs `command` with `input` on stdin and waits for it, at most `seconds` (six times as long under
// sanitizers), with at most kMemoryLimitBytes of memory of its own (of resident memory
// under sanitizers).
Outcome run_program(const std::vector<std::string>& command, std::string_view input = {},
                    double seconds = 120);

}  // namespace nibble::test
