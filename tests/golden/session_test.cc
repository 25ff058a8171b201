// Sessions on a real model: whatever way a session came to its tokens, it continues as a fresh one.

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <thread>

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

// To the last bit where the kernels sum each row alike whatever the batch; where they may not, each
// logit, below 30 by its softcap, is off by some 50 roundings of half an ulp.
constexpr float kRounding = 50 * 30 * 0x1p-24f;

void expect_same_logits(const Session& a, const Session& b) {
  ASSERT_EQ(a.logits().size(), b.logits().size());
  ASSERT_FALSE(a.logits().empty());
  for (size_t i = 0; i < a.logits().size(); ++i) {
    ASSERT_NEAR(a.logits()[i], b.logits()[i], kRounding) << "logit " << i;
  }
}

class MicroSession : public ::testing::Test {
 protected:
  static std::unique_ptr<Engine> open(const EngineOptions& options) {
    return Engine::open(test::fixture("models/micro-gemma4-f16.gguf"), options);
  }
  EngineOptions options() const {
    EngineOptions options;
    options.backend = "cpu";
    options.kv_format = backend::KvFormat::kF32;
    options.context = 512;
    options.sessions = 3;
    options.ubatch = 48;
    return options;
  }

  // That `session` stands where a fresh one stands after its tokens: same logits, same text.
  void expect_like_fresh(Session& session, size_t more) {
    const Tokens so_far(session.tokens().begin(), session.tokens().end());
    const auto fresh = engine_->new_session();
    fresh->extend(so_far, 1);
    expect_same_logits(session, *fresh);
    EXPECT_EQ(generate(session, more), generate(*fresh, more));
    expect_same_logits(session, *fresh);
  }

  std::unique_ptr<Engine> engine_ = open(options());
};

TEST_F(MicroSession, InterleavedAndBatchedSessionsGiveWhatEachGivesAlone) {
  constexpr size_t kCount = 20;
  const Tokens prompts[] = {slice(0, 200), slice(1000, 61)};
  const backend::SamplingParams sampling[] = {{.temperature = 0},
                                              {.top_k = 64, .top_p = 0.95f, .seed = 7}};
  Tokens expected[2];
  for (size_t i = 0; i < 2; ++i) {
    const auto alone = engine_->new_session();
    alone->set_sampling(sampling[i]);
    alone->extend(prompts[i]);
    expected[i] = generate(*alone, kCount);
  }
  for (const bool batched : {false, true}) {
    SCOPED_TRACE(batched ? "batched" : "interleaved");
    const std::unique_ptr<Session> sessions[] = {engine_->new_session(), engine_->new_session()};
    Session* const both[] = {sessions[0].get(), sessions[1].get()};
    Tokens drawn[2];
    for (size_t i = 0; i < 2; ++i) {
      both[i]->set_sampling(sampling[i]);
      both[i]->feed(prompts[i]);
    }
    for (size_t turn = 0; drawn[0].size() < kCount || drawn[1].size() < kCount; ++turn) {
      engine_->step(batched ? std::span(both) : std::span(both).subspan(turn % 2, 1));
      for (size_t i = 0; i < 2; ++i) {
        ASSERT_FALSE(both[i]->error());
        if (both[i]->pending() != 0 || drawn[i].size() == kCount) continue;
        drawn[i].push_back(both[i]->next_token());
        both[i]->feed(std::span(drawn[i]).last(1));
      }
    }
    for (size_t i = 0; i < 2; ++i) EXPECT_EQ(drawn[i], expected[i]) << "session " << i;
  }
}

TEST_F(MicroSession, ResumingEqualsFresh) {
  const auto session = engine_->new_session();
  session->extend(slice(0, 150));
  generate(*session, 3);
  session->extend(slice(400, 60), 1);
  expect_like_fresh(*session, 5);
}

TEST_F(MicroSession, RewindingPastTheWindowEqualsFresh) {
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

TEST_F(MicroSession, BranchingInsideTheWindowReusesAllThatIsCommon) {
  const auto session = engine_->new_session();
  session->sync(slice(0, 100));
  const uint32_t reused = session->sync(joined(slice(0, 90), slice(7000, 30)), 1);
  EXPECT_EQ(reused, 90u);
  expect_like_fresh(*session, 5);
}

TEST_F(MicroSession, CancelInPrefillLeavesTheSessionUsableAndRight) {
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

TEST_F(MicroSession, TheContextsLastTokenCanBeUsedAndNotOneMore) {
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

TEST_F(MicroSession, SameSeedSameText) {
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

TEST_F(MicroSession, KvMemoryStaysWithinWhatWasComputed) {
  const uint64_t most = engine::memory_needs(engine_->plan(), options()).kv_bytes;
  std::vector<std::unique_ptr<Session>> sessions;
  for (int i = 0; i < 3; ++i) sessions.push_back(engine_->new_session());
  for (const size_t length : {140, 300, 512}) {
    for (auto& session : sessions) session->sync(slice(0, length));
  }
  EXPECT_LE(engine_->backend().memory().kv_bytes, most);
}

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
