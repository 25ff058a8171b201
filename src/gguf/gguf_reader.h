#pragma once
// Private to the room: the sections of a GGUF file, in the order in which they lie in it.

#include <cstdint>
#include <vector>

#include "gguf/byte_reader.h"
#include "gguf/gguf_file.h"

namespace nibble::gguf {

struct Header {
  uint32_t version;
  uint64_t tensor_count;  // as announced, not checked
  uint64_t key_count;     // likewise
};

Header read_header(ByteReader& in);

std::vector<Metadata> read_metadata(ByteReader& in, uint64_t count);

// Reads the tensors' table and places each tensor in the data section behind it. `alignment` must
// be a power of two below 2^32. Names are not compared with one another.
std::vector<Tensor> read_tensors(ByteReader& in, uint64_t count, uint64_t alignment);

// One value of any type but an array.
Value read_scalar(ByteReader& in, ValueType type);

}  // namespace nibble::gguf
