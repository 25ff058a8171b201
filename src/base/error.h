#pragma once
// The one exception of the library, and the check for our own bugs.

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace nibble {

enum class ErrorCode {
  kInvalidArgument,  // a caller asked for something that can't be
  kIo,               // the operating system refused: missing file, disk full
  kMalformedFile,    // the file breaks its own format
  kUnsupported,      // well-formed, but not something this build runs
  kOutOfMemory,      // would not fit; the message says needed, free and what would fit
  kContextFull,      // more tokens than the session's context holds
  kCancelled,        // the caller's cancel flag was seen
  kSessionUnusable,  // an earlier error left the session undefined: reset it
  kDevice,           // the accelerator or its driver failed
};

// Thrown for everything that a file, a user or the machine can cause. The message says what was
// found, what was expected and where, and is fit to be shown to a person as it is.
class Error : public std::runtime_error {
 public:
  Error(ErrorCode code, const std::string& message) : std::runtime_error(message), code_(code) {}
  ErrorCode code() const noexcept { return code_; }

 private:
  ErrorCode code_;
};

template <class... Args>
[[noreturn]] void fail(ErrorCode code, fmt::format_string<Args...> format, Args&&... args) {
  throw Error(code, fmt::format(format, std::forward<Args>(args)...));
}

namespace internal {
[[noreturn]] void check_failed(const char* condition, const char* file, int line);
}

}  // namespace nibble

// For our own bugs only: no input may reach a failing check. Aborts with the place.
#define NIBBLE_CHECK(condition) \
  ((condition) ? (void)0 : ::nibble::internal::check_failed(#condition, __FILE__, __LINE__))
