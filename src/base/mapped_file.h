#pragma once

#include <cstddef>
#include <cstdint>
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

  // Whether `path` leads to the file whose bytes these are, by whatever name.
  bool is(const std::filesystem::path& path) const;

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
  uint64_t device_ = 0, inode_ = 0;  // of the file, where it is not empty
};

}  // namespace nibble
