#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace nibble::engine {

// A file being written: under its name with ".partial" until finish() has seen all of it safe on
// the disk, and gone if that never happens. All methods throw Error(kIo) with the system's reason;
// a file of that name is never touched: somebody else may be writing it.
class PartialFile {
 public:
  explicit PartialFile(std::filesystem::path path);
  ~PartialFile();
  PartialFile(const PartialFile&) = delete;
  PartialFile& operator=(const PartialFile&) = delete;

  void seek(uint64_t offset) { position_ = offset; }
  void write(std::span<const std::byte> bytes);  // from the position on, which moves behind them
  void finish();

 private:
  [[noreturn]] void fail_io(const char* what) const;

  const std::filesystem::path path_, partial_;
  int file_;
  uint64_t position_ = 0;
  bool finished_ = false;
};

}  // namespace nibble::engine
