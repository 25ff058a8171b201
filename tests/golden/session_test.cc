// Sessions on a real model: whatever way a session came to its tokens, it continues as a fresh one.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <thread>

#include "engine/devices.h"
#include "engine/engine.h"
#include "support/fixtures.h"

namespace nibble {
namespace {

using engine::Engine;
using engine::EngineOptions;
using engine::Session;
using Tokens = std::vector<TokenId>;

constexpr uint32_t kWindow = 128;  // micro's

const Tokens& text() {
  static const Tokens tokens = [] {
    Tokens result = {{2}};  // BOS
    for (int32_t id : test::read_i32(test::fixture("golden/micro.heldout_text.tokens.i32"))) {
      result.push_back({id});
    }
    return result;
  }();
  return tokens;
}

Tokens slice(size_t begin, size_t count) {
  return {text().begin() + ptrdiff_t(begin), text().begin() + ptrdiff_t(begin + count)};
}

Tokens joined(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

Tokens generate(Session& session, size_t count) {
  Tokens drawn;
  while (drawn.size() < count) {
    drawn.push_back(session.next_token());
    session.extend(std::span(drawn).last(1), 1);
  }
  return drawn;
}

// How keys and values are stored, the same in windows.
struct Cache {
  std::string backend;
  backend::KvFormat format;
  backend::KvLayout layout;
};
void PrintTo(const Cache& cache, std::ostream* out) {
  *out << cache.backend << " " << to_string(cache.format)
       << (cache.layout == backend::KvLayout::kSplit ? " split" : "");
}

class MicroSession : public ::testing::TestWithParam<Cache> {
 protected:
  void SetUp() override {
    const Cache& cache = GetParam();
    if (!has_device(cache.backend)) GTEST_SKIP() << "this machine has no device for it";
    if (std::ranges::count(engine::kv_formats(cache.backend), cache.format) == 0) {
      GTEST_SKIP() << "it has no kernels for this format";
    }
    engine_ = open(options());
  }
  static bool has_device(const std::string& backend) {
    return std::ranges::count(engine::list_devices(), backend, &engine::Device::backend) > 0;
  }
  static std::unique_ptr<Engine> open(const EngineOptions& options) {
    return Engine::open(test::fixture("models/micro-gemma4-f16.gguf"), options);
  }
  EngineOptions options() const {
    EngineOptions options;
    options.backend = GetParam().backend;
    options.kv_format = options.kv_window_format = GetParam().format;
    options.kv_layout = GetParam().layout;
    options.context = 512;
    options.sessions = 3;
    options.ubatch = 48;
    return options;
  }

  // How far logits, below 30 by their softcap, may end apart that were reached on different ways.
  float tolerance() const {
    // The CPU sums each row alike whatever the batch, most to the last bit: 50 roundings of half
    // an ulp.
    if (GetParam().backend == "cpu") return 50 * 30 * 0x1p-24f;
    // On CUDA other kernels take other numbers of rows, and sums become f16 activations: 0.02 on
    // either way. That changes numbers in the cache that lie between two levels, so that logits
    // move by a part of the format's own error, which is up to 0.24 and 2.2 in this text.
    switch (GetParam().format) {
      case backend::KvFormat::kQ8:
        return 0.2f;
      case backend::KvFormat::kTq4:
        return 1;
      default:
        return 0.04f;
    }
  }
  bool exact() const { return GetParam().backend == "cpu"; }

  void expect_same_logits(std::span<const float> a, std::span<const float> b) const {
    ASSERT_EQ(a.size(), b.size());
    ASSERT_FALSE(a.empty());
    for (size_t i = 0; i < a.size(); ++i) ASSERT_NEAR(a[i], b[i], tolerance()) << "logit " << i;
  }
  // That `session` stands where a fresh one stands after its tokens: the same logits there and
  // after each of its next `more` tokens.
  void expect_like_fresh(Session& session, size_t more) {
    const Tokens so_far(session.tokens().begin(), session.tokens().end());
    const auto fresh = engine_->new_session();
    fresh->extend(so_far, 1);
    expect_same_logits(session.logits(), fresh->logits());
    for (size_t i = 0; i < more; ++i) {
      const TokenId next = session.next_token();
      if (exact()) {
        ASSERT_EQ(fresh->next_token(), next);
      }
      session.extend({&next, 1}, 1);
      fresh->extend({&next, 1}, 1);
      expect_same_logits(session.logits(), fresh->logits());
    }
  }

  std::unique_ptr<Engine> engine_;
};

TEST_P(MicroSession, InterleavedAndBatchedSessionsGiveWhatEachGivesAlone) {
  constexpr size_t kCount = 20;
  const Tokens prompts[] = {slice(0, 200), slice(1000, 61)};
  const backend::SamplingParams sampling[] = {{.temperature = 0},
                                              {.top_k = 64, .top_p = 0.95f, .seed = 7}};
  Tokens expected[2];
  std::vector<std::vector<float>> logits[2];  // after the prompt and each token
  for (size_t i = 0; i < 2; ++i) {
    const auto alone = engine_->new_session();
    alone->set_sampling(sampling[i]);
    alone->extend(prompts[i], 1);
    while (expected[i].size() < kCount) {
      logits[i].emplace_back(alone->logits().begin(), alone->logits().end());
      expected[i].push_back(alone->next_token());
      alone->extend(std::span(expected[i]).last(1), 1);
    }
  }
  for (const bool batched : {false, true}) {
    SCOPED_TRACE(batched ? "batched" : "interleaved");
    const std::unique_ptr<Session> sessions[] = {engine_->new_session(), engine_->new_session()};
    Session* const both[] = {sessions[0].get(), sessions[1].get()};
    size_t drawn[2] = {};
    for (size_t i = 0; i < 2; ++i) {
      both[i]->set_sampling(sampling[i]);
      both[i]->feed(prompts[i], 1);
    }
    for (size_t turn = 0; drawn[0] < kCount || drawn[1] < kCount; ++turn) {
      engine_->step(batched ? std::span(both) : std::span(both).subspan(turn % 2, 1));
      for (size_t i = 0; i < 2; ++i) {
        SCOPED_TRACE(fmt::format("session {}, token {}", i, drawn[i]));
        ASSERT_FALSE(both[i]->error());
        if (both[i]->pending() != 0 || drawn[i] == kCount) continue;
        expect_same_logits(both[i]->logits(), logits[i][drawn[i]]);
        if (exact()) {
          ASSERT_EQ(both[i]->next_token(), expected[i][drawn[i]]);
        }
        both[i]->feed({&expected[i][drawn[i]++], 1}, 1);
      }
    }
  }
}

TEST_P(MicroSession, ResumingEqualsFresh) {
  const auto session = engine_->new_session();
  session->extend(slice(0, 150));
  generate(*session, 3);
  session->extend(slice(400, 60), 1);
  expect_like_fresh(*session, 5);
}

TEST_P(MicroSession, RewindingPastTheWindowEqualsFresh) {
  const auto session = engine_->new_session();
  const Tokens prompt = slice(0, 180);
  session->sync(prompt);
  session->extend(slice(2000, 2 * kWindow));
  const uint32_t reused = session->sync(joined(prompt, slice(3000, 40)), 1);
  EXPECT_GE(reused, 100u) << "no snapshot was found";
  EXPECT_LE(reused, 180u);
  expect_like_fresh(*session, 20);
  // To where no snapshot is.
  const Tokens other = joined(slice(0, 50), slice(5000, 150));
  EXPECT_EQ(session->sync(other, 1), 0u);
  expect_like_fresh(*session, 5);
}

TEST_P(MicroSession, BranchingInsideTheWindowReusesAllThatIsCommon) {
  const auto session = engine_->new_session();
  session->sync(slice(0, 100));
  const uint32_t reused = session->sync(joined(slice(0, 90), slice(7000, 30)), 1);
  EXPECT_EQ(reused, 90u);
  expect_like_fresh(*session, 5);
}

TEST_P(MicroSession, CancelInPrefillLeavesTheSessionUsableAndRight) {
  const auto session = engine_->new_session();
  const Tokens prompt = slice(0, 300);
  const auto cancel_midway = [&](std::string_view, uint64_t done, uint64_t) {
    if (done >= 100) std::thread([&] { session->cancel(); }).join();
  };
  try {
    session->extend(prompt, 0, cancel_midway);
    FAIL() << "it was cancelled";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kCancelled);
  }
  EXPECT_LT(session->tokens().size(), prompt.size());
  EXPECT_GE(session->tokens().size(), 100u);
  EXPECT_GT(session->sync(prompt, 1), 0u);
  expect_like_fresh(*session, 5);
}

TEST_P(MicroSession, TheContextsLastTokenCanBeUsedAndNotOneMore) {
  const auto session = engine_->new_session();
  session->extend(slice(0, 510), 1);
  generate(*session, 2);
  const Tokens one = slice(0, 1);
  try {
    session->extend(one);
    FAIL() << "513 tokens in 512";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kContextFull);
    EXPECT_NE(std::string(error.what()).find("513 tokens asked for, the context holds 512"),
              std::string::npos)
        << error.what();
  }
  EXPECT_EQ(session->tokens().size(), 512u);
}

TEST_P(MicroSession, SameSeedSameText) {
  const auto draw = [&](uint64_t seed) {
    const auto session = engine_->new_session();
    backend::SamplingParams params = engine_->default_sampling();
    params.seed = seed;
    session->set_sampling(params);
    session->extend(slice(0, 40));
    return generate(*session, 40);
  };
  const Tokens first = draw(11);
  EXPECT_EQ(draw(11), first);
  EXPECT_NE(draw(12), first);
}

TEST_P(MicroSession, KvMemoryStaysWithinWhatWasComputed) {
  const uint64_t most = engine::memory_needs(engine_->plan(), options()).kv_bytes;
  std::vector<std::unique_ptr<Session>> sessions;
  for (int i = 0; i < 3; ++i) sessions.push_back(engine_->new_session());
  for (const size_t length : {140, 300, 512}) {
    for (auto& session : sessions) session->sync(slice(0, length));
  }
  EXPECT_LE(engine_->backend().memory().kv_bytes, most);
}

TEST_P(MicroSession, ALargeContextTakesPagesAsTheyAreNeeded) {
  EngineOptions large = options();
  large.context = 131072;
  engine_ = open(large);
  backend::Backend& backend = engine_->backend();
  EXPECT_EQ(backend.memory().kv_bytes, 0u);
  const auto session = engine_->new_session();
  session->extend(slice(0, 33), 1);
  uint64_t two_pages_each = 0;
  for (const backend::KvGroup& group : backend.kv().groups())
    two_pages_each += 2 * group.page_bytes;
  EXPECT_EQ(backend.memory().kv_bytes, two_pages_each);
  expect_like_fresh(*session, 2);
}

INSTANTIATE_TEST_SUITE_P(Caches, MicroSession, testing::ValuesIn([] {
                           using enum backend::KvFormat;
                           std::vector<Cache> caches = {{"cpu", kF32, backend::KvLayout::kSplit}};
                           for (const char* backend : {"cpu", "cuda"}) {
                             for (const backend::KvFormat format : {kF16, kQ8, kTq4}) {
                               caches.push_back({backend, format, backend::KvLayout::kAuto});
                             }
                           }
                           return caches;
                         }()),
                         [](const auto& info) {
                           std::string name = testing::PrintToString(info.param);
                           std::ranges::replace(name, ' ', '_');
                           return name;
                         });

TEST(EngineOpen, UnknownAndAbsentBackendsAreNamedWithWhatThereIs) {
  const auto refusal = [](const EngineOptions& options, ErrorCode code) -> std::string {
    try {
      Engine::open(test::fixture("models/micro-gemma4-f16.gguf"), options);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), code);
      return error.what();
    }
    ADD_FAILURE() << "it opened";
    return "";
  };
  EngineOptions options;
#ifdef NIBBLE_HAS_CUDA
  const std::string names = "auto, cuda, cpu, reference";
#else
  const std::string names = "auto, cpu, reference";
#endif
  options.backend = "abacus";
  EXPECT_EQ(refusal(options, ErrorCode::kInvalidArgument),
            "there is no backend 'abacus'; this build has: " + names);
  options.backend = "metal";
  EXPECT_EQ(refusal(options, ErrorCode::kUnsupported),
            "this build has no backend 'metal'; it has: " + names);
  options = {};
  options.device = 3;
  refusal(options, ErrorCode::kInvalidArgument);
  options = {};
  options.sessions = 0;
  refusal(options, ErrorCode::kInvalidArgument);
  options = {};
  options.ubatch = 1'000'000;
  refusal(options, ErrorCode::kInvalidArgument);
  options = {};
  options.context = 4'000'000'000;
  options.sessions = 60'000;
  const std::string message = refusal(options, ErrorCode::kOutOfMemory);
  EXPECT_NE(message.find("what would fit: "), std::string::npos) << message;
}

TEST(EngineOpen, ReportsLoadingAndItsSizes) {
  uint64_t loaded = 0;
  const auto engine = Engine::open(test::fixture("models/micro-gemma4-Q4_K_M.gguf"), {},
                                   [&](std::string_view what, uint64_t done, uint64_t total) {
                                     EXPECT_EQ(what, "loading");
                                     EXPECT_LE(done, total);
                                     loaded = done;
                                   });
  EXPECT_EQ(loaded, engine->plan().weight_bytes());
  EXPECT_EQ(engine->context(), 2048u);
  EXPECT_EQ(engine->ubatch(), 512u);
  ASSERT_NE(engine->tokenizer(), nullptr);
  EXPECT_EQ(engine->tokenizer()->vocabulary(), engine->plan().vocabulary);
  EXPECT_NE(engine->chat_format(), nullptr);
  EXPECT_NO_THROW(engine->default_sampling().validate(engine->plan().vocabulary));
}

TEST(EngineOpen, AMissingFileIsAnError) {
  try {
    Engine::open("/nowhere/model.gguf", {});
    FAIL() << "it opened";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo);
  }
}

}  // namespace
}  // namespace nibble
