#include "base/memory.h"

#include <sys/resource.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <string>

#ifdef __APPLE__
#include <mach/mach.h>
#include <sys/sysctl.h>
#endif

namespace nibble {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

#ifndef __APPLE__
// The number behind `key` in a file of "key number" lines; `otherwise` when it is not there.
uint64_t read_number(const std::string& path, const std::string& key, uint64_t otherwise) {
  std::ifstream file(path);
  std::string word;
  uint64_t number;
  while (file >> word) {
    if (word == key) return file >> number ? number : otherwise;
  }
  return otherwise;
}

uint64_t machine_kilobytes(const char* key) {
  return read_number("/proc/meminfo", key, 0) << 10;
}

// Control group (version 2) of this process, "" when there is none.
std::string control_group() {
  std::ifstream file("/proc/self/cgroup");
  std::string line;
  while (std::getline(file, line)) {
    if (line.starts_with("0::")) return "/sys/fs/cgroup" + line.substr(3);
  }
  return {};
}

uint64_t container_limit() {
  uint64_t limit;
  std::ifstream file(control_group() + "/memory.max");
  return file >> limit ? limit : kUnlimited;  // "max" is no number
}
#endif

}  // namespace

uint64_t total_memory_bytes() {
#ifdef __APPLE__
  uint64_t bytes = 0;
  size_t size = sizeof(bytes);
  sysctlbyname("hw.memsize", &bytes, &size, nullptr, 0);
  return bytes;
#else
  return std::min(machine_kilobytes("MemTotal:"), container_limit());
#endif
}

uint64_t available_memory_bytes() {
#ifdef __APPLE__
  vm_statistics64_data_t pages{};
  mach_msg_type_number_t count = HOST_VM_INFO64_COUNT;
  host_statistics64(mach_host_self(), HOST_VM_INFO64, reinterpret_cast<host_info64_t>(&pages),
                    &count);
  return (uint64_t{pages.free_count} + pages.inactive_count) * vm_kernel_page_size;
#else
  const uint64_t machine = machine_kilobytes("MemAvailable:");
  const uint64_t limit = container_limit();
  if (limit == kUnlimited) return machine;
  const uint64_t taken = read_number(control_group() + "/memory.stat", "anon", 0);
  return std::min(machine, limit - std::min(limit, taken));
#endif
}

uint64_t peak_resident_bytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
#ifdef __APPLE__
  return uint64_t(usage.ru_maxrss);
#else
  return uint64_t(usage.ru_maxrss) << 10;
#endif
}

}  // namespace nibble
