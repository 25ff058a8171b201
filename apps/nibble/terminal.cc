#include "nibble/terminal.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>

#include "base/error.h"
#include "engine/engine.h"
#include "text/utf8.h"

namespace nibble::app {
namespace {

std::atomic<engine::Session*> interruptible = nullptr;
std::atomic<bool> interrupted = false;
static_assert(std::atomic<engine::Session*>::is_always_lock_free &&
              std::atomic<bool>::is_always_lock_free);

void on_interrupt(int) {
  interrupted = true;
  if (engine::Session* session = interruptible.load()) session->cancel();
}

}  // namespace

std::string printable(std::string_view unsafe) {
  std::string safe;
  safe.reserve(unsafe.size());
  while (!unsafe.empty()) {
    const text::Utf8Unit unit = text::first_unit(unsafe);
    const uint8_t lead = uint8_t(unsafe.front());
    const bool c1_control = unit.bytes == 2 && lead == 0xc2 && uint8_t(unsafe[1]) < 0xa0;
    if (unit.kind != text::Utf8::kWhole) {
      safe += "\uFFFD";
    } else if ((lead < 0x20 && lead != '\n' && lead != '\t') || lead == 0x7f || c1_control) {
      safe += fmt::format("\\x{:02x}", uint8_t(unsafe[unit.bytes - 1]));
    } else {
      safe += unsafe.substr(0, unit.bytes);
    }
    unsafe.remove_prefix(unit.bytes);
  }
  return safe;
}

std::string human_bytes(uint64_t bytes) {
  constexpr std::string_view kUnits[] = {"B", "kB", "MB", "GB", "TB", "PB", "EB"};
  double value = double(bytes);
  size_t unit = 0;
  while (value >= 999.5) {
    value /= 1000;
    ++unit;
  }
  if (unit == 0) return fmt::format("{} B", bytes);
  return fmt::format("{:.{}f} {}", value, value < 9.995 ? 2 : value < 99.95 ? 1 : 0, kUnits[unit]);
}

ProgressBar::ProgressBar() : enabled_(::isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() {
  if (drawn_) fmt::print(stderr, "\r\x1b[K");
}

void ProgressBar::update(std::string_view what, uint64_t done, uint64_t total) {
  constexpr double kFirstMs = 1000, kEveryMs = 100;
  const double now = since_start_.ms();
  if (!enabled_ || total == 0 || now < kFirstMs || now < last_drawn_ms_ + kEveryMs) return;
  last_drawn_ms_ = now;
  drawn_ = true;
  constexpr size_t kWidth = 30;
  const double fraction = std::min(1.0, double(done) / double(total));
  const size_t filled = size_t(fraction * kWidth);
  fmt::print(stderr, "\r\x1b[K{} [{:#<{}}{:.<{}}] {:3.0f} %", what, "", filled, "", kWidth - filled,
             100 * fraction);
  std::fflush(stderr);
}

Progress ProgressBar::callback() {
  return
      [this](std::string_view what, uint64_t done, uint64_t total) { update(what, done, total); };
}

CatchInterrupt::CatchInterrupt(engine::Session* session) : session_(session) {
  interrupted = false;
  interruptible = session;
  struct sigaction action = {};
  action.sa_handler = on_interrupt;
  action.sa_flags = int(SA_RESETHAND | SA_RESTART);  // the second one finds the default again
  ::sigaction(SIGINT, &action, nullptr);
}

CatchInterrupt::~CatchInterrupt() {
  std::signal(SIGINT, SIG_DFL);
  interruptible = nullptr;
  if (session_) session_->forget_cancel();
}

void CatchInterrupt::check() const {
  if (interrupted) fail(ErrorCode::kCancelled, "stopped by Ctrl-C");
}

}  // namespace nibble::app
