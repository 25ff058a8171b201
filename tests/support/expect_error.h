#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/error.h"

namespace nibble::test {

// Runs `action`, which must throw an Error of `code` whose message has all of `parts`.
template <class Action>
void expect_error(ErrorCode code, const std::vector<std::string>& parts, const Action& action) {
  try {
    action();
    ADD_FAILURE() << "no error; expected one that says " << parts.at(0);
  } catch (const Error& error) {
    EXPECT_EQ(int(error.code()), int(code)) << error.what();
    for (const std::string& part : parts) {
      EXPECT_NE(std::string(error.what()).find(part), std::string::npos)
          << "expected " << part << " in: " << error.what();
    }
  }
}

}  // namespace nibble::test
