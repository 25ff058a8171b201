#include "support/process.h"

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <thread>

namespace nibble::test {
namespace {

// Files, not pipes: nobody has to read while the program writes.
using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

File temporary_file() {
  File file(std::tmpfile(), &std::fclose);
  if (!file) throw std::runtime_error("can't make a temporary file");
  return file;
}

std::string contents(std::FILE* file) {
  std::string text;
  std::rewind(file);
  char buffer[65536];
  while (const size_t count = std::fread(buffer, 1, sizeof buffer, file)) {
    text.append(buffer, count);
  }
  return text;
}

[[noreturn]] void become(std::vector<char*> arguments, int in, int out, int err) {
  ::dup2(in, STDIN_FILENO);
  ::dup2(out, STDOUT_FILENO);
  ::dup2(err, STDERR_FILENO);
  if constexpr (kSanitized) {
    ::setenv("ASAN_OPTIONS", "hard_rss_limit_mb=6144:allocator_may_return_null=0", 1);
  } else {
    const rlimit limit{kMemoryLimitBytes, kMemoryLimitBytes};
    ::setrlimit(RLIMIT_DATA, &limit);  // GPU drivers reserve addresses without end
  }
  ::execv(arguments[0], arguments.data());
  ::_exit(127);
}

}  // namespace

Outcome run_program(const std::vector<std::string>& command, std::string_view input,
                    double seconds) {
  const File in = temporary_file(), out = temporary_file(), err = temporary_file();
  if (!input.empty()) std::fwrite(input.data(), 1, input.size(), in.get());
  std::rewind(in.get());
  std::vector<char*> arguments;
  for (const std::string& argument : command) {
    arguments.push_back(const_cast<char*>(argument.c_str()));
  }
  arguments.push_back(nullptr);

  const pid_t child = ::fork();
  if (child < 0) throw std::runtime_error("can't fork");
  if (child == 0) become(arguments, fileno(in.get()), fileno(out.get()), fileno(err.get()));

  using Clock = std::chrono::steady_clock;
  const auto deadline =
      Clock::now() + std::chrono::duration<double>(kSanitized ? 6 * seconds : seconds);
  Outcome outcome;
  int status;
  while (::waitpid(child, &status, WNOHANG) == 0) {
    if (!outcome.timed_out && Clock::now() > deadline) {
      outcome.timed_out = true;
      ::kill(child, SIGKILL);
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  if (WIFEXITED(status)) outcome.exit_code = WEXITSTATUS(status);
  if (WIFSIGNALED(status)) outcome.signal = WTERMSIG(status);
  outcome.out = contents(out.get());
  outcome.err = contents(err.get());
  return outcome;
}

}  // namespace nibble::test
