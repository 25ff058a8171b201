#include "base/mapped_file.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <string>
#include <string_view>
#include <utility>

#include "base/error.h"

namespace nibble {
namespace {

class MappedFileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "nibble-mapped-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path write(const char* name, std::string_view contents) {
    std::ofstream(folder_ / name, std::ios::binary) << contents;
    return folder_ / name;
  }

  static std::string_view text(const MappedFile& file) {
    return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()};
  }

  // The message of the Error(kIo) that opening `path` throws.
  static std::string refusal(const std::filesystem::path& path) {
    try {
      MappedFile::open(path);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo);
      return error.what();
    }
    ADD_FAILURE() << path << " was accepted";
    return {};
  }

  std::filesystem::path folder_;
};

TEST_F(MappedFileTest, HoldsTheBytes) {
  EXPECT_EQ(text(MappedFile::open(write("a", std::string("one\0two", 7)))),
            std::string_view("one\0two", 7));
  EXPECT_TRUE(MappedFile::open(write("empty", "")).bytes().empty());
  EXPECT_TRUE(MappedFile().bytes().empty());
}

TEST_F(MappedFileTest, MovingLeavesTheBytesInPlace) {
  MappedFile first = MappedFile::open(write("a", "first"));
  const std::byte* place = first.bytes().data();
  MappedFile second = std::move(first);
  EXPECT_EQ(second.bytes().data(), place);
  first = MappedFile::open(write("b", "second"));
  std::swap(first, second);
  EXPECT_EQ(text(first), "first");
  EXPECT_EQ(first.bytes().data(), place);
  EXPECT_EQ(text(second), "second");
}

TEST_F(MappedFileTest, KnowsItsFileByAnyName) {
  const auto path = write("a", "same"), other = write("b", "same");
  std::filesystem::create_symlink(path, folder_ / "link");
  const MappedFile file = MappedFile::open(path);
  EXPECT_TRUE(file.is(path));
  EXPECT_TRUE(file.is(folder_ / "." / "link"));
  EXPECT_FALSE(file.is(other));
  EXPECT_FALSE(file.is(folder_ / "missing"));
  EXPECT_FALSE(MappedFile().is(path));
}

TEST_F(MappedFileTest, RefusalsSayPathAndReason) {
  const std::string missing = refusal(folder_ / "missing.gguf");
  EXPECT_NE(missing.find("missing.gguf"), std::string::npos) << missing;
  EXPECT_NE(missing.find("No such file"), std::string::npos) << missing;
  EXPECT_NE(refusal(folder_).find("not a regular file"), std::string::npos);
  EXPECT_NE(refusal("/dev/null").find("not a regular file"), std::string::npos);
  const std::filesystem::path pipe = folder_ / "pipe";  // that nobody will ever write to
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_NE(refusal(pipe).find("not a regular file"), std::string::npos);
}

}  // namespace
}  // namespace nibble
