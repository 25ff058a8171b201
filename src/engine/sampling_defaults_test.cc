#include "engine/sampling_defaults.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "base/error.h"
#include "support/gguf_builder.h"

namespace nibble::engine {
namespace {

backend::SamplingParams defaults_of(const test::GgufBuilder& builder) {
  const std::vector<std::byte> bytes = builder.build();
  return sampling_defaults(gguf::GgufFile::from_bytes(bytes));
}

TEST(SamplingDefaults, AreGemmasWhereTheFileSaysNothing) {
  const auto params = defaults_of(test::GgufBuilder().string("general.architecture", "gemma4"));
  EXPECT_EQ(params.temperature, 1.0f);
  EXPECT_EQ(params.top_k, 64u);
  EXPECT_EQ(params.top_p, 0.95f);
  EXPECT_EQ(params.min_p, 0.0f);
  EXPECT_EQ(params.repetition_penalty, 1.0f);
}

TEST(SamplingDefaults, ComeFromTheFile) {
  const auto params = defaults_of(test::GgufBuilder()
                                      .f32("general.sampling.temp", 0.7f)
                                      .i32("general.sampling.top_k", 20)
                                      .f32("general.sampling.top_p", 0.8f)
                                      .f32("general.sampling.min_p", 0.05f)
                                      .f32("general.sampling.penalty_repeat", 1.05f));
  EXPECT_EQ(params.temperature, 0.7f);
  EXPECT_EQ(params.top_k, 20u);
  EXPECT_EQ(params.top_p, 0.8f);
  EXPECT_EQ(params.min_p, 0.05f);
  EXPECT_EQ(params.repetition_penalty, 1.05f);
}

TEST(SamplingDefaults, NegativeTopKMeansOff) {
  EXPECT_EQ(defaults_of(test::GgufBuilder().i32("general.sampling.top_k", -1)).top_k, 0u);
}

TEST(SamplingDefaults, ValuesOutOfRangeAreRefusedByName) {
  try {
    defaults_of(
        test::GgufBuilder().f32("general.sampling.temp", std::numeric_limits<float>::quiet_NaN()));
    FAIL() << "temperature NaN was taken";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kMalformedFile);
    EXPECT_NE(std::string(error.what()).find("temperature is nan"), std::string::npos);
  }
  EXPECT_THROW(defaults_of(test::GgufBuilder().f32("general.sampling.top_p", 1.5f)), Error);
  EXPECT_THROW(defaults_of(test::GgufBuilder().string("general.sampling.temp", "hot")), Error);
}

}  // namespace
}  // namespace nibble::engine
