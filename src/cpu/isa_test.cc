#include "cpu/isa.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <string>

#include "base/error.h"

namespace nibble::cpu {
namespace {

// Sets NIBBLE_ISA for one scope.
class IsaOverride {
 public:
  explicit IsaOverride(std::string_view name) {
    setenv("NIBBLE_ISA", std::string(name).c_str(), /*overwrite=*/1);
  }
  ~IsaOverride() { unsetenv("NIBBLE_ISA"); }
};

TEST(Isa, ScalarRunsEverywhere) {
  EXPECT_EQ(available_isas().front(), Isa::kScalar);
}

TEST(Isa, TheBestIsTheDefault) {
  IsaOverride none("");
  EXPECT_EQ(default_isa(), available_isas().back());
}

TEST(Isa, TheEnvironmentForcesEachOneThatTheMachineHas) {
  for (Isa isa : available_isas()) {
    IsaOverride forced(isa_name(isa));
    EXPECT_EQ(default_isa(), isa);
  }
}

TEST(Isa, OneThatTheMachineLacksIsRefusedByName) {
  for (std::string_view wanted : {"avx1024", "AVX2", "scalar "}) {
    IsaOverride forced(wanted);
    try {
      default_isa();
      ADD_FAILURE() << wanted << " was accepted";
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
      const std::string message = error.what();
      EXPECT_NE(message.find(wanted), std::string::npos) << message;
      for (Isa isa : available_isas()) {
        EXPECT_NE(message.find(isa_name(isa)), std::string::npos) << message;
      }
    }
  }
}

}  // namespace
}  // namespace nibble::cpu
