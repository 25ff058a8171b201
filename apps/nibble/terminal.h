#pragma once
// What people see besides the result: progress, safe text, and Ctrl-C.

#include <chrono>
#include <string>
#include <string_view>

#include "base/progress.h"

namespace nibble::engine {
class Session;
}

namespace nibble::app {

// Text of unknown origin made safe to print: control characters (but newline and tab) become
// "\x1b", bytes that are no UTF-8 become U+FFFD.
std::string printable(std::string_view text);

// "1.46 GB", "81.9 kB": powers of ten.
std::string human_bytes(uint64_t bytes);

class Stopwatch {
 public:
  double ms() const {
    return std::chrono::duration<double, std::milli>(Clock::now() - start_).count();
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point start_ = Clock::now();
};

// A bar on stderr when that is a terminal, from the second second on; wiped when destroyed.
class ProgressBar {
 public:
  ProgressBar();
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  void update(std::string_view what, uint64_t done, uint64_t total);
  // For the library's functions; must not outlive the bar.
  Progress callback();

 private:
  const bool enabled_;
  Stopwatch since_start_;
  double last_drawn_ms_ = 0;
  bool drawn_ = false;
};

// While it lives, the first Ctrl-C is held back; a second one ends the program as usual. One at a
// time.
class CatchInterrupt {
 public:
  CatchInterrupt() : CatchInterrupt(nullptr) {}
  // The first one cancels the session, too. What comes too late for its last step is forgotten.
  explicit CatchInterrupt(engine::Session& session) : CatchInterrupt(&session) {}
  ~CatchInterrupt();
  CatchInterrupt(const CatchInterrupt&) = delete;
  CatchInterrupt& operator=(const CatchInterrupt&) = delete;

  // Throws Error(kCancelled) after a Ctrl-C.
  void check() const;

 private:
  explicit CatchInterrupt(engine::Session* session);

  engine::Session* const session_;
};

}  // namespace nibble::app
