#pragma once
// Private to the room: bytes of a file, read front to back with every step checked.

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace nibble::gguf {

static_assert(std::endian::native == std::endian::little, "GGUF is read as it lies in the file");

// A name from a file, fit for a message: in quotes, unprintable bytes as \xNN, shortened if long.
std::string quoted(std::string_view name);

class ByteReader {
 public:
  // `file` is named in messages; both must outlive the reader.
  ByteReader(std::span<const std::byte> bytes, std::string_view file)
      : bytes_(bytes), file_(file) {}

  std::span<const std::byte> bytes() const { return bytes_; }
  uint64_t position() const { return position_; }
  uint64_t remaining() const { return bytes_.size() - position_; }
  // Where in the file a view that was read from it begins.
  uint64_t offset_of(std::string_view view) const {
    return uint64_t(reinterpret_cast<const std::byte*>(view.data()) - bytes_.data());
  }

  // Says what comes next, for messages about it: "the value of", "a.key".
  void expect(std::string_view what, std::string_view name = {}) {
    what_ = what;
    name_ = name;
  }

  std::string subject() const {
    return name_.empty() ? std::string(what_) : fmt::format("{} {}", what_, quoted(name_));
  }

  // Refuses `count` things of at least `bytes_each` bytes that the rest of the file can't hold.
  // To be asked before anything is allocated for them.
  void check_count(uint64_t count, uint64_t bytes_each, std::string_view things) const {
    if (count > remaining() / bytes_each) {
      malformed(position_,
                "{} {} of at least {} bytes each announced, but only {} bytes left; the file is "
                "cut short or damaged",
                count, things, bytes_each, remaining());
    }
  }

  std::span<const std::byte> take(uint64_t count) {
    if (count > remaining()) {
      malformed(position_,
                "the file ends in {}: {} bytes expected, {} left; it is cut short or damaged",
                subject(), count, remaining());
    }
    const auto taken = bytes_.subspan(position_, count);
    position_ += count;
    return taken;
  }

  template <class Number>
  Number number() {
    Number value;
    std::memcpy(&value, take(sizeof value).data(), sizeof value);
    return value;
  }

  std::string_view string() {
    const auto length = number<uint64_t>();
    const auto bytes = take(length);
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }

  template <class... Args>
  [[noreturn]] void malformed(uint64_t at, fmt::format_string<Args...> format,
                              Args&&... args) const {
    fail_at(ErrorCode::kMalformedFile, at, format, std::forward<Args>(args)...);
  }
  template <class... Args>
  [[noreturn]] void unsupported(uint64_t at, fmt::format_string<Args...> format,
                                Args&&... args) const {
    fail_at(ErrorCode::kUnsupported, at, format, std::forward<Args>(args)...);
  }

 private:
  template <class... Args>
  [[noreturn]] void fail_at(ErrorCode code, uint64_t at, fmt::format_string<Args...> format,
                            Args&&... args) const {
    fail(code, "{}, byte {}: {}", file_, at, fmt::format(format, std::forward<Args>(args)...));
  }

  std::span<const std::byte> bytes_;
  std::string_view file_;
  uint64_t position_ = 0;
  std::string_view what_;
  std::string_view name_;
};

}  // namespace nibble::gguf
