// A session pays for the tokens that it has, not for those that it might have.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <ctime>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "support/fixtures.h"

namespace nibble {
namespace {

using backend::KvFormat;
using engine::Engine;
using engine::Session;

constexpr size_t kTokens = 512, kDecoded = 48;

// One session in a context of so many tokens. One thread, so that processor time is the work.
class Decoder {
 public:
  Decoder(KvFormat format, uint32_t context) {
    engine::EngineOptions options;
    options.backend = "cpu";
    options.kv_format = options.kv_window_format = format;
    options.context = context;
    options.threads = 1;
    options.snapshots = 0;
    engine_ = Engine::open(test::fixture("models/micro-gemma4-f16.gguf"), options);
    for (int32_t id : test::read_i32(test::fixture("golden/micro.heldout_text.tokens.i32"))) {
      if (tokens_.size() < kTokens) tokens_.push_back({id});
    }
  }

  // Processor seconds of decoding the last of kTokens tokens.
  double decode_s() {
    session_.reset();
    session_ = engine_->new_session();
    session_->extend(std::span(tokens_).first(kTokens - kDecoded));
    const std::clock_t begin = std::clock();
    for (size_t i = kTokens - kDecoded; i < kTokens; ++i) session_->extend({&tokens_[i], 1}, 1);
    return double(std::clock() - begin) / CLOCKS_PER_SEC;
  }
  std::vector<float> logits() const {
    return {session_->logits().begin(), session_->logits().end()};
  }
  backend::MemoryUse memory() { return engine_->backend().memory(); }

 private:
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<Session> session_;
  std::vector<TokenId> tokens_;
};

class BoundedWork : public testing::TestWithParam<KvFormat> {};

TEST_P(BoundedWork, ALargeContextCostsNothingWhileItIsEmpty) {
  Decoder small(GetParam(), 1024), large(GetParam(), 131072);
  double small_s = std::numeric_limits<double>::max(), large_s = small_s;
  // Other programs only add time, so the least times approach what the work takes.
  for (int round = 0; round < 60; ++round) {
    small_s = std::min(small_s, small.decode_s());
    large_s = std::min(large_s, large.decode_s());
    if (round >= 3 && std::abs(large_s / small_s - 1) <= 0.02) break;
  }
  fmt::print("{} tokens of {}: {:.4f} s in a context of 1024, {:.4f} s in one of 131072\n",
             kDecoded, to_string(GetParam()), small_s, large_s);
  EXPECT_NEAR(large_s / small_s, 1, 0.02);
  EXPECT_EQ(large.logits(), small.logits());
  EXPECT_EQ(large.memory().kv_bytes, small.memory().kv_bytes);
  EXPECT_EQ(large.memory().workspace_bytes, small.memory().workspace_bytes);
}

INSTANTIATE_TEST_SUITE_P(, BoundedWork,
                         testing::Values(KvFormat::kF16, KvFormat::kQ8, KvFormat::kTq4),
                         [](const auto& info) { return std::string(to_string(info.param)); });

}  // namespace
}  // namespace nibble
