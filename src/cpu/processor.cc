#include "cpu/processor.h"

#include <fstream>
#ifdef __APPLE__
#include <sys/sysctl.h>
#endif

namespace nibble::cpu {

std::string processor_name() {
#ifdef __APPLE__
  char name[256];
  size_t size = sizeof name;
  if (sysctlbyname("machdep.cpu.brand_string", name, &size, nullptr, 0) == 0) return name;
#else
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(": ");
    if (line.starts_with("model name") && colon != std::string::npos) return line.substr(colon + 2);
  }
#endif
  return "processor";
}

}  // namespace nibble::cpu
