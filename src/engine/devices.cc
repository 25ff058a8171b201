#include "engine/devices.h"

#include "base/memory.h"
#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/processor.h"

namespace nibble::engine {

std::vector<Device> list_devices() {
  return {{.backend = "cpu",
           .index = 0,
           .name = cpu::processor_name(),
           .cores = ThreadPool().size(),
           .isa = std::string(cpu::isa_name(cpu::default_isa())),
           .memory_bytes = total_memory_bytes(),
           .free_bytes = available_memory_bytes()}};
}

}  // namespace nibble::engine
