#pragma once

#include <string>

namespace nibble::cpu {

// "AMD EPYC 7B13": the processor as the system calls it, "processor" where it doesn't say.
std::string processor_name();

}  // namespace nibble::cpu
