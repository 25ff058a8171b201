#include "text/utf8.h"

#include <gtest/gtest.h>

#include <string>

namespace nibble::text {
namespace {

TEST(Utf8, WholeCharactersOfEveryLength) {
  for (const std::string_view character : {"a", "\x7f", "\u0080", "\u07ff", "\u0800", "\ud7ff",
                                           "\ue000", "\uffff", "\U00010000", "\U0010ffff"}) {
    const Utf8Unit unit = first_unit(std::string(character) + "tail");
    EXPECT_EQ(unit.kind, Utf8::kWhole) << character;
    EXPECT_EQ(unit.bytes, character.size()) << character;
    for (size_t cut = 1; cut < character.size(); ++cut) {
      EXPECT_EQ(first_unit(character.substr(0, cut)).kind, Utf8::kUnfinished) << character;
    }
  }
}

TEST(Utf8, BrokenBytesAreMaximalSubparts) {
  const struct {
    std::string_view text;
    size_t bytes;
  } cases[] = {
      {"\x80", 1},              // a continuation byte alone
      {"\xc0\x80", 1},          // overlong: C0 begins nothing
      {"\xe0\x80\x80", 1},      // overlong
      {"\xed\xa0\x80", 1},      // a surrogate
      {"\xf4\x90\x80\x80", 1},  // above U+10FFFF
      {"\xff", 1},
      {"\xe2\x96"
       "a",
       2},  // cut short by another character
      {"\xf0\x9f\x98"
       "a",
       3},
      {"\xf0\x9f\xf0\x9f", 2},
  };
  for (const auto& [text, bytes] : cases) {
    const Utf8Unit unit = first_unit(text);
    EXPECT_EQ(unit.kind, Utf8::kBroken) << text;
    EXPECT_EQ(unit.bytes, bytes) << text;
  }
}

TEST(Utf8, TrimsWhatPythonStrips) {
  EXPECT_EQ(trim(""), "");
  EXPECT_EQ(trim(" \t\n\v\f\r\x1c\x1d\x1e\x1f"), "");
  EXPECT_EQ(trim("\u0085\u00a0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000"), "");
  EXPECT_EQ(trim("\u3000 a \u00a0 b\u2003\n"), "a \u00a0 b");
  EXPECT_EQ(trim("\u200b\ufeff"), "\u200b\ufeff");  // zero width: not white space
  EXPECT_EQ(trim("\x80 \xff"), "\x80 \xff");
}

}  // namespace
}  // namespace nibble::text
