#include "engine/partial_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "base/error.h"

namespace nibble::engine {

PartialFile::PartialFile(std::filesystem::path path)
    : path_(std::move(path)),
      partial_(path_.string() + ".partial"),
      file_(::open(partial_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666)) {
  if (file_ < 0 && errno == EEXIST) {
    fail(ErrorCode::kIo,
         "{} is there already: either it is being written, or whoever wrote it was killed; then "
         "remove it",
         partial_.string());
  }
  if (file_ < 0) fail_io("create");
}

PartialFile::~PartialFile() {
  ::close(file_);
  if (!finished_) ::unlink(partial_.c_str());
}

void PartialFile::write(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(file_, bytes.data(), bytes.size(), off_t(position_));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_io("write");
    position_ += uint64_t(written);
    bytes = bytes.subspan(size_t(written));
  }
}

void PartialFile::finish() {
  if (::fsync(file_) != 0) fail_io("write");
  if (::rename(partial_.c_str(), path_.c_str()) != 0) fail_io("rename");
  finished_ = true;
}

void PartialFile::fail_io(const char* what) const {
  fail(ErrorCode::kIo, "{}: can't {} it: {}", partial_.string(), what, std::strerror(errno));
}

}  // namespace nibble::engine
