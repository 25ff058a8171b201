#include "base/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace nibble {

MappedFile MappedFile::open(const std::filesystem::path& path) {
  // Non-blocking, so that a pipe without a writer is refused below and not waited for.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) fail(ErrorCode::kIo, "{}: can't open: {}", path.string(), strerror(errno));
  const auto fail_and_close = [&](const char* what, const char* reason) {
    ::close(descriptor);
    fail(ErrorCode::kIo, "{}: {}: {}", path.string(), what, reason);
  };

  struct stat status;
  if (::fstat(descriptor, &status) != 0) fail_and_close("can't read its size", strerror(errno));
  if (!S_ISREG(status.st_mode)) fail_and_close("can't map it", "it is not a regular file");
  const size_t size = size_t(status.st_size);
  if (size == 0) {  // mmap refuses empty files; an empty span is the honest answer
    ::close(descriptor);
    return {};
  }
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_SHARED, descriptor, 0);
  if (data == MAP_FAILED) fail_and_close("can't map it", strerror(errno));
  ::close(descriptor);
  MappedFile file;
  file.data_ = static_cast<const std::byte*>(data);
  file.size_ = size;
  file.device_ = status.st_dev;
  file.inode_ = status.st_ino;
  return file;
}

bool MappedFile::is(const std::filesystem::path& path) const {
  struct stat status;
  return data_ != nullptr && ::stat(path.c_str(), &status) == 0 && status.st_dev == device_ &&
         status.st_ino == inode_;
}

MappedFile::MappedFile(MappedFile&& other) noexcept {
  *this = std::move(other);
}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(device_, other.device_);
  std::swap(inode_, other.inode_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace nibble
