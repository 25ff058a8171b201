#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace nibble::text {

enum class Utf8 {
  kWhole,       // one well-formed character
  kBroken,      // bytes that can't begin a character, whatever follows
  kUnfinished,  // the text ends inside a character that is well-formed so far
};

struct Utf8Unit {
  Utf8 kind;
  size_t bytes;
};

// The first unit of a text that is not empty. A broken one is a "maximal subpart" (Unicode 15,
// section 3.9): what one U+FFFD stands for.
Utf8Unit first_unit(std::string_view text);

// `text` without white space at both ends, as Python's str.strip() (and so Jinja's trim) sees it.
// `text` may hold invalid UTF-8.
std::string_view trim(std::string_view text);

}  // namespace nibble::text
