#pragma once
// What memory the process may still take, and has taken.

#include <cstdint>

namespace nibble {

// Memory that this process may use at all: the machine's, or its container's limit if smaller.
uint64_t total_memory_bytes();

// Memory that could be taken now without swapping; pages of mapped files count as free, as the
// system drops them when it must. Never more than total_memory_bytes().
uint64_t available_memory_bytes();

// Most memory that this process ever had resident, mapped files included.
uint64_t peak_resident_bytes();

}  // namespace nibble
