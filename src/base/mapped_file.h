#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace nibble {

// A whole file mapped read-only. The bytes stay where they are for the object's life; moving the
// object does not move them.
class MappedFile {
 public:
  MappedFile() = default;
  // Throws Error(kIo) with the system's reason: missing, a directory, no permission.
  static MappedFile open(const std::filesystem::path& path);

  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  MappedFile(const std::byte* data, size_t size) : data_(data), size_(size) {}

  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace nibble
