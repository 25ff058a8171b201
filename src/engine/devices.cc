#include "engine/devices.h"

#include <fmt/format.h>

#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/processor.h"
#ifdef NIBBLE_HAS_CUDA
#include "cuda/cuda_backend.h"
#endif

namespace nibble::engine {

std::vector<Device> list_devices() {
  std::vector<Device> devices;
#ifdef NIBBLE_HAS_CUDA
  for (uint32_t i = 0; i < cuda::device_count(); ++i) {
    const cuda::DeviceInfo info = cuda::device_info(i);
    devices.push_back({.backend = "cuda",
                       .index = i,
                       .name = info.name,
                       .cores = info.multiprocessors,
                       .isa = fmt::format("compute capability {}.{}", info.major, info.minor),
                       .memory_bytes = info.memory_bytes,
                       .free_bytes = info.free_bytes});
  }
#endif
  devices.push_back({.backend = "cpu",
                     .index = 0,
                     .name = cpu::processor_name(),
                     .cores = ThreadPool().size(),
                     .isa = std::string(cpu::isa_name(cpu::default_isa())),
                     .memory_bytes = total_memory_bytes(),
                     .free_bytes = available_memory_bytes()});
  return devices;
}

}  // namespace nibble::engine
