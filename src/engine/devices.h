#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace nibble::engine {

// Something that this build can run models on.
struct Device {
  std::string backend;  // "cuda", "cpu"
  uint32_t index;       // as in EngineOptions::device
  std::string name;     // "AMD EPYC 7763", as the system calls it
  uint32_t cores;       // that this process may use; of a GPU its multiprocessors
  std::string isa;      // the instruction set that the kernels take; of a GPU its generation
  uint64_t memory_bytes;
  uint64_t free_bytes;
};

// All devices of this machine, without measuring anything. Throws Error(kInvalidArgument) when
// NIBBLE_ISA asks for what the machine lacks.
std::vector<Device> list_devices();

}  // namespace nibble::engine
