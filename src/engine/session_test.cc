// Sessions and the scheduler on a fake model whose logits show every mistake with the cache.

#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "engine/engine.h"
#include "engine/fake_backend.h"
#include "engine/memory.h"
#include "engine/scheduler.h"

namespace nibble::engine {
namespace {

using test::fake_logits;
using test::FakeBackend;
using test::kVocabulary;
using test::kWindow;
using Tokens = std::vector<TokenId>;

constexpr uint32_t kUbatch = 16;
constexpr uint32_t kContext = 400;

Tokens random_tokens(std::mt19937_64& random, size_t count) {
  Tokens tokens(count);
  for (TokenId& token : tokens) token.value = static_cast<int32_t>(random() % kVocabulary);
  return tokens;
}

Tokens joined(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

std::vector<float> last_row(const Session& session) {
  const std::span<const float> logits = session.logits();
  EXPECT_GE(logits.size(), kVocabulary);
  const auto row = logits.last(std::min<size_t>(kVocabulary, logits.size()));
  return {row.begin(), row.end()};
}

// `count` tokens drawn one after the other.
Tokens generate(Session& session, size_t count) {
  Tokens drawn;
  while (drawn.size() < count) {
    drawn.push_back(session.next_token());
    session.extend(std::span(drawn).last(1), 1);
  }
  return drawn;
}

ErrorCode code_of(const std::function<void()>& action, std::string* message = nullptr) {
  try {
    action();
  } catch (const Error& error) {
    if (message != nullptr) *message = error.what();
    return error.code();
  }
  ADD_FAILURE() << "no error";
  return ErrorCode::kDevice;
}

class SessionTest : public ::testing::Test {
 protected:
  std::unique_ptr<Session> new_session() { return scheduler_.new_session(); }
  Tokens tokens(size_t count) { return random_tokens(random_, count); }

  // What a session of its own engine draws after `prompt`.
  Tokens alone(const Tokens& prompt, size_t count, const backend::SamplingParams& sampling) {
    FakeBackend backend(kUbatch);
    Scheduler scheduler(backend, {kVocabulary, kContext, kUbatch});
    const auto session = scheduler.new_session();
    session->set_sampling(sampling);
    session->extend(prompt);
    return generate(*session, count);
  }

  uint64_t seed_ = std::random_device{}();
  ::testing::ScopedTrace trace_{__FILE__, __LINE__, seed_};
  std::mt19937_64 random_{seed_};
  FakeBackend backend_{kUbatch};
  Scheduler scheduler_{backend_, {kVocabulary, kContext, kUbatch}};
};

TEST_F(SessionTest, ChunkedPrefillGivesTheLogitsOfTheWholeText) {
  for (const size_t count : {1, 15, 16, 17, 40, 41, 200}) {
    const auto session = new_session();
    const Tokens prompt = tokens(count);
    session->extend(prompt, 1);
    EXPECT_EQ(last_row(*session), fake_logits(prompt)) << count;
    EXPECT_TRUE(std::ranges::equal(session->tokens(), prompt));
  }
}

TEST_F(SessionTest, LogitRowsOfSeveralChunksComeInOrder) {
  const auto session = new_session();
  const Tokens prompt = tokens(60);
  session->extend(prompt, 45);
  ASSERT_EQ(session->logits().size(), 45u * kVocabulary);
  for (size_t row = 0; row < 45; ++row) {
    const auto expected = fake_logits(std::span(prompt).first(15 + row + 1));
    const auto actual = session->logits().subspan(row * kVocabulary, kVocabulary);
    EXPECT_TRUE(std::ranges::equal(actual, expected)) << row;
  }
}

TEST_F(SessionTest, ResumeEqualsFresh) {
  const auto session = new_session();
  Tokens text;
  for (const size_t count : {7, 1, 100, 1, 1, 33}) {
    const Tokens more = tokens(count);
    session->extend(more, 1);
    text = joined(text, more);
    EXPECT_EQ(last_row(*session), fake_logits(text));
  }
}

TEST_F(SessionTest, GreedyTakesTheLikeliest) {
  const auto session = new_session();
  Tokens text = tokens(50);
  session->extend(text, 1);
  for (int i = 0; i < 60; ++i) {
    const std::vector<float> logits = fake_logits(text);
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    ASSERT_EQ(session->next_token().value, best);
    text.push_back(session->next_token());
    session->extend(std::span(text).last(1));
  }
}

TEST_F(SessionTest, SessionsInterleavedAndBatchedGiveWhatEachGivesAlone) {
  for (const bool batched : {false, true}) {
    std::vector<std::unique_ptr<Session>> sessions;
    std::vector<Session*> all;
    std::vector<Tokens> expected, drawn;
    for (uint64_t i = 0; i < 5; ++i) {
      const Tokens prompt = tokens(1 + random_() % 100);
      const backend::SamplingParams sampling{
          .top_k = 20, .repetition_penalty = 1.3f, .seed = random_()};
      expected.push_back(alone(prompt, 80, sampling));
      sessions.push_back(new_session());
      sessions.back()->set_sampling(sampling);
      sessions.back()->feed(prompt);
      all.push_back(sessions.back().get());
    }
    drawn.resize(all.size());
    while (drawn[0].size() + drawn[1].size() + drawn[2].size() + drawn[3].size() + drawn[4].size() <
           5 * 80) {
      if (batched) {
        scheduler_.step(all);
      } else {
        scheduler_.step(std::span(all).subspan(random_() % 5, 1));
      }
      for (size_t i = 0; i < all.size(); ++i) {
        ASSERT_FALSE(all[i]->error());
        if (all[i]->pending() != 0 || drawn[i].size() == 80) continue;
        drawn[i].push_back(all[i]->next_token());
        all[i]->feed(std::span(drawn[i]).last(1));
      }
    }
    EXPECT_EQ(drawn, expected) << (batched ? "batched" : "interleaved");
  }
}

TEST_F(SessionTest, SameSeedSameTextAnotherSeedAnother) {
  const Tokens prompt = tokens(20);
  const Tokens text = alone(prompt, 50, {.seed = 1});
  EXPECT_EQ(alone(prompt, 50, {.seed = 1}), text);
  EXPECT_NE(alone(prompt, 50, {.seed = 2}), text);
}

TEST_F(SessionTest, PenaltiesSeeTheHistory) {
  const auto session = new_session();
  session->set_sampling({.temperature = 0, .presence_penalty = 100, .penalty_window = 1000});
  session->extend(tokens(10));
  const Tokens drawn = generate(*session, 60);
  for (size_t i = 0; i < drawn.size(); ++i) {
    EXPECT_EQ(std::count(drawn.begin(), drawn.end(), drawn[i]), 1);
    EXPECT_EQ(std::count(session->tokens().begin(), session->tokens().begin() + 10, drawn[i]), 0);
  }
}

TEST_F(SessionTest, SyncReusesWhatIsCommonExactly) {
  const auto session = new_session();
  const Tokens shared = tokens(20);
  const Tokens first = joined(shared, tokens(10));
  EXPECT_EQ(session->sync(first, 1), 0u);
  EXPECT_EQ(last_row(*session), fake_logits(first));
  // All of it again: the last token is run anew.
  EXPECT_EQ(session->sync(first, 1), 29u);
  EXPECT_EQ(last_row(*session), fake_logits(first));
  // A prefix of it, then a branch, both within the window.
  EXPECT_EQ(session->sync(shared, 1), 19u);
  EXPECT_EQ(last_row(*session), fake_logits(shared));
  const Tokens second = joined(shared, tokens(15));
  EXPECT_EQ(session->sync(second, 1), 20u);
  EXPECT_EQ(last_row(*session), fake_logits(second));
  // Rows of logits are run anew, too.
  EXPECT_EQ(session->sync(second, 12), 35u - 12);
  EXPECT_EQ(session->logits().size(), 12u * kVocabulary);
}

TEST_F(SessionTest, SyncPastTheWindowGoesBackToASnapshot) {
  const auto session = new_session();
  const Tokens prompt = tokens(150);
  session->sync(prompt);
  generate(*session, 100);  // several windows on
  const Tokens other = joined(prompt, tokens(30));
  const uint32_t reused = session->sync(other, 1);
  EXPECT_GE(reused, 150u - 16 - 1) << "a prompt's end has a snapshot";
  EXPECT_LE(reused, 150u);
  EXPECT_EQ(last_row(*session), fake_logits(other));
  // Not the prompt's end but somewhere in it: nothing is left of that.
  Tokens early(prompt.begin(), prompt.begin() + 60);
  early = joined(early, tokens(100));
  EXPECT_EQ(session->sync(early, 1), 0u);
  EXPECT_EQ(last_row(*session), fake_logits(early));
}

TEST_F(SessionTest, ATemplateThatRewritesThePromptsEndStillReuses) {
  const auto session = new_session();
  const Tokens conversation = tokens(150);
  session->sync(joined(conversation, tokens(5)));
  generate(*session, 100);
  const Tokens next = joined(conversation, tokens(120));
  EXPECT_GE(session->sync(next, 1), 100u);
  EXPECT_EQ(last_row(*session), fake_logits(next));
}

TEST_F(SessionTest, TruncateReachesExactlyWhatTheWindowAllows) {
  const auto session = new_session();
  Tokens text = tokens(30);
  session->extend(text);
  text = joined(text, generate(*session, 170));
  ASSERT_EQ(session->tokens().size(), 200u);
  EXPECT_EQ(session->truncate(1000), 200u);
  // At 200 pages from 128 on are left: the window of 191 starts there, that of 190 before.
  EXPECT_EQ(session->truncate(191), 191u);
  EXPECT_EQ(session->truncate(100), 30u - 16) << "the prompt's snapshot";
  EXPECT_TRUE(std::ranges::equal(session->tokens(), std::span(text).first(14)));
  const Tokens more = tokens(60);
  session->extend(more, 1);
  EXPECT_EQ(last_row(*session), fake_logits(joined({text.begin(), text.begin() + 14}, more)));
  EXPECT_EQ(session->truncate(0), 0u);
  EXPECT_TRUE(session->tokens().empty());
}

TEST_F(SessionTest, SnapshotsOfAnotherBranchAreForgotten) {
  const auto session = new_session();
  session->sync(tokens(110));
  generate(*session, 100);
  const Tokens second = tokens(160);
  session->sync(second);
  generate(*session, 60);
  // What the second branch's snapshot no longer has, but the first one's had.
  const uint32_t length = session->truncate(100);
  const Tokens more = tokens(20);
  session->extend(more, 1);
  EXPECT_EQ(last_row(*session),
            fake_logits(joined({second.begin(), second.begin() + length}, more)));
}

// Everything that moves a session about, in random order, against the text alone.
TEST_F(SessionTest, RandomWalksEqualFreshSessions) {
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Tokens> texts(3);
  for (size_t i = 0; i < texts.size(); ++i) sessions.push_back(new_session());
  for (int step = 0; step < 300; ++step) {
    const size_t i = random_() % texts.size();
    Session& session = *sessions[i];
    Tokens& text = texts[i];
    const size_t cut = text.empty() ? 0 : random_() % (text.size() + 1);
    switch (random_() % 4) {
      case 0: {
        const Tokens more = tokens(1 + random_() % 50);
        if (text.size() + more.size() > kContext) continue;
        text = joined(text, more);
        session.extend(more, 1);
        break;
      }
      case 1:
        text = joined({text.begin(), text.begin() + ptrdiff_t(cut)}, tokens(1 + random_() % 70));
        if (text.size() > kContext) text.resize(kContext);
        session.sync(text, 1);
        break;
      case 2:
        text.resize(session.truncate(static_cast<uint32_t>(cut)));
        continue;
      case 3:
        if (random_() % 10 == 0) {
          session.reset();
          text.clear();
        }
        continue;
    }
    ASSERT_EQ(last_row(session), fake_logits(text)) << "step " << step;
    ASSERT_TRUE(std::ranges::equal(session.tokens(), text));
  }
  sessions.clear();
  EXPECT_EQ(backend_.kv().pages_in_use(0) + backend_.kv().pages_in_use(1), 0u);
}

TEST_F(SessionTest, AStepSharesItsBudgetFairly) {
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Session*> all;
  for (const size_t count : {100, 1, 100, 1, 3}) {
    sessions.push_back(new_session());
    sessions.back()->feed(tokens(count));
    all.push_back(sessions.back().get());
  }
  EXPECT_TRUE(scheduler_.step(all));
  EXPECT_EQ(backend_.batches.back(), (std::vector<size_t>{1, 1, 3, 5, 6}));
  EXPECT_TRUE(scheduler_.step(all));
  EXPECT_EQ(backend_.batches.back(), (std::vector<size_t>{8, 8}));
  while (scheduler_.step(all)) {
  }
  for (Session* session : all) EXPECT_EQ(session->pending(), 0u);
}

TEST_F(SessionTest, MoreSessionsThanBudgetTakeTurns) {
  std::vector<std::unique_ptr<Session>> sessions;
  std::vector<Session*> all;
  for (uint32_t i = 0; i < kUbatch + 10; ++i) {
    sessions.push_back(new_session());
    sessions.back()->feed(tokens(2));
    all.push_back(sessions.back().get());
  }
  scheduler_.step(all);
  scheduler_.step(all);
  for (Session* session : all) EXPECT_LT(session->pending(), 2u);
}

TEST_F(SessionTest, ContextFullSaysBothNumbersAndChangesNothing) {
  const auto session = new_session();
  const Tokens text = tokens(kContext - 10);
  session->extend(text);
  std::string message;
  const auto too_many = [&] { session->extend(tokens(11)); };
  EXPECT_EQ(code_of(too_many, &message), ErrorCode::kContextFull);
  EXPECT_NE(message.find("401 tokens asked for, the context holds 400"), std::string::npos);
  EXPECT_NE(message.find("-c"), std::string::npos);
  const Tokens more = tokens(10);
  session->extend(more, 1);
  EXPECT_EQ(last_row(*session), fake_logits(joined(text, more)));
  const Tokens long_prefix = tokens(kContext + 1);
  EXPECT_EQ(code_of([&] { session->sync(long_prefix); }), ErrorCode::kContextFull);
  EXPECT_EQ(session->tokens().size(), kContext);
}

TEST_F(SessionTest, WrongArgumentsAreRefused) {
  const auto session = new_session();
  const auto refused = [&](const std::function<void()>& action) {
    EXPECT_EQ(code_of(action), ErrorCode::kInvalidArgument);
    EXPECT_EQ(session->pending(), 0u);
  };
  refused([&] { session->feed({}); });
  refused([&] { session->sync({}); });
  refused([&] { session->feed(Tokens{{0}, {-1}}); });
  refused([&] { session->feed(Tokens{{int32_t{kVocabulary}}}); });
  refused([&] { session->feed(Tokens{{0}}, 2); });
  refused([&] { session->next_token(); });
  refused([&] { session->set_sampling({.temperature = -1}); });
  FakeBackend other_backend(kUbatch);
  Scheduler other(other_backend, {kVocabulary, kContext, kUbatch});
  Session* const stranger[] = {session.get()};
  refused([&] { other.step(stranger); });
}

TEST_F(SessionTest, ASessionGivenTwiceRunsOnce) {
  const auto session = new_session();
  const Tokens text = tokens(5);
  session->feed(text, 1);
  Session* const twice[] = {session.get(), session.get()};
  EXPECT_FALSE(scheduler_.step(twice));
  EXPECT_EQ(last_row(*session), fake_logits(text));
}

TEST_F(SessionTest, CancelInPrefillKeepsWhatWasDone) {
  const auto session = new_session();
  const Tokens start = tokens(50);
  session->extend(start);
  // From another thread, in the middle of the third chunk.
  int layers = 0;
  backend_.before_layer = [&](uint32_t) {
    if (++layers == 2 * 3 + 2) std::thread([&] { session->cancel(); }).join();
  };
  const Tokens prompt = tokens(100);
  EXPECT_EQ(code_of([&] { session->extend(prompt); }), ErrorCode::kCancelled);
  ASSERT_TRUE(session->error());
  EXPECT_EQ(session->error()->code(), ErrorCode::kCancelled);
  EXPECT_EQ(session->tokens().size(), 50u + 2 * kUbatch);
  EXPECT_EQ(session->pending(), 0u);
  EXPECT_EQ(code_of([&] { session->next_token(); }), ErrorCode::kInvalidArgument);
  const Tokens whole = joined(start, prompt);
  EXPECT_EQ(session->sync(whole, 1), 50u + 2 * kUbatch);
  EXPECT_EQ(last_row(*session), fake_logits(whole));
  EXPECT_FALSE(session->error());
}

TEST_F(SessionTest, CancelBeforeAStepStopsTheNextOneOnly) {
  const auto session = new_session();
  session->cancel();
  const Tokens text = tokens(5);
  EXPECT_EQ(code_of([&] { session->extend(text); }), ErrorCode::kCancelled);
  EXPECT_TRUE(backend_.batches.empty());
  session->extend(text, 1);
  EXPECT_EQ(last_row(*session), fake_logits(text));
  session->cancel();
  session->reset();
  session->extend(text);
  session->cancel();
  session->forget_cancel();
  session->extend(text);
}

TEST_F(SessionTest, CancellingOneLeavesTheOthersOfTheBatch) {
  const auto a = new_session();
  const auto b = new_session();
  const Tokens text = tokens(6);
  a->feed(text, 1);
  b->feed(text, 1);
  backend_.before_layer = [&](uint32_t layer) {
    if (layer == 1) a->cancel();
  };
  Session* const both[] = {a.get(), b.get()};
  EXPECT_FALSE(scheduler_.step(both));
  EXPECT_EQ(a->error()->code(), ErrorCode::kCancelled);
  EXPECT_TRUE(a->tokens().empty());
  EXPECT_FALSE(b->error());
  EXPECT_EQ(last_row(*b), fake_logits(text));
  // All of them: the batch itself stops.
  a->feed(text);
  b->feed(text);
  int layers = 0;
  backend_.before_layer = [&](uint32_t) {
    ++layers;
    a->cancel();
    b->cancel();
  };
  EXPECT_FALSE(scheduler_.step(both));
  EXPECT_EQ(layers, 1);
  EXPECT_EQ(b->error()->code(), ErrorCode::kCancelled);
  EXPECT_EQ(b->tokens().size(), 6u);
}

TEST_F(SessionTest, ADeviceErrorPoisonsThoseWhoTookPartUntilReset) {
  const auto a = new_session();
  const auto b = new_session();
  const auto bystander = new_session();
  const Tokens text = tokens(20);
  for (Session* session : {a.get(), b.get(), bystander.get()}) session->extend(text);
  backend_.before_layer = [](uint32_t) { fail(ErrorCode::kDevice, "the device fell over"); };
  a->feed(text);
  b->feed(text);
  Session* const both[] = {a.get(), b.get()};
  EXPECT_FALSE(scheduler_.step(both));
  backend_.before_layer = nullptr;
  for (Session* session : both) {
    ASSERT_TRUE(session->error());
    EXPECT_EQ(session->error()->code(), ErrorCode::kDevice);
    std::string message;
    for (const std::function<void()>& action :
         {std::function<void()>([&] { session->extend(text); }),
          std::function<void()>([&] { session->sync(text); }),
          std::function<void()>([&] { session->truncate(0); })}) {
      EXPECT_EQ(code_of(action, &message), ErrorCode::kSessionUnusable);
      EXPECT_NE(message.find("the device fell over"), std::string::npos) << message;
      EXPECT_NE(message.find("reset"), std::string::npos) << message;
    }
    session->reset();
    EXPECT_FALSE(session->error());
    session->extend(text, 1);
    EXPECT_EQ(last_row(*session), fake_logits(text));
  }
  bystander->extend(text, 1);
  EXPECT_EQ(last_row(*bystander), fake_logits(joined(text, text)));
}

TEST_F(SessionTest, WhereNoLogitIsANumberOnlyThatSessionFails) {
  const auto broken = new_session();
  const auto bystander = new_session();
  const Tokens text = tokens(5);
  backend_.nan_token = TokenId{3};
  broken->feed(joined(text, {TokenId{3}}));
  bystander->feed(joined(text, {TokenId{4}}), 1);
  Session* const both[] = {broken.get(), bystander.get()};
  EXPECT_FALSE(scheduler_.step(both));
  ASSERT_TRUE(broken->error());
  EXPECT_EQ(broken->error()->code(), ErrorCode::kMalformedFile);
  EXPECT_NE(std::string(broken->error()->what()).find("NaN"), std::string::npos);
  EXPECT_FALSE(bystander->error());
  EXPECT_EQ(last_row(*bystander), fake_logits(joined(text, {TokenId{4}})));
}

TEST_F(SessionTest, AnyExceptionOfABackendIsAnErrorOfTheSession) {
  const auto session = new_session();
  backend_.before_layer = [](uint32_t) { throw std::bad_alloc(); };
  EXPECT_EQ(code_of([&] { session->extend(tokens(3)); }), ErrorCode::kOutOfMemory);
  session->reset();
  backend_.before_layer = [](uint32_t) { throw std::runtime_error("odd"); };
  EXPECT_EQ(code_of([&] { session->extend(tokens(3)); }), ErrorCode::kDevice);
}

TEST_F(SessionTest, AnyExceptionWhilePagesArePreparedIsAnErrorOfThatSessionAlone) {
  const auto sharing = new_session();
  const auto bystander = new_session();
  const Tokens text = tokens(40), more = tokens(5);
  sharing->extend(text);
  // Back on the prompt's snapshot, whose last page must be copied before more is written on it.
  ASSERT_EQ(sharing->truncate(24), 24u);
  backend_.kv().before_copy = [] { throw std::bad_alloc(); };
  sharing->feed(more);
  bystander->feed(more, 1);
  Session* const both[] = {sharing.get(), bystander.get()};
  EXPECT_FALSE(scheduler_.step(both));
  ASSERT_TRUE(sharing->error());
  EXPECT_EQ(sharing->error()->code(), ErrorCode::kOutOfMemory);
  EXPECT_FALSE(bystander->error());
  EXPECT_EQ(last_row(*bystander), fake_logits(more));
}

TEST_F(SessionTest, ProgressCountsThePrompt) {
  const auto session = new_session();
  std::vector<uint64_t> seen;
  session->extend(tokens(40), 0, [&](std::string_view, uint64_t done, uint64_t total) {
    EXPECT_EQ(total, 40u);
    seen.push_back(done);
  });
  EXPECT_EQ(seen, (std::vector<uint64_t>{16, 32, 40}));
}

// A plan with the fake's KV groups, for fit().
backend::Plan fake_plan() {
  backend::Plan plan;
  plan.trained_context = kContext;
  plan.vocabulary = kVocabulary;
  plan.caches = {{1, 1, kWindow, false}, {1, 1, kWindow, false}, {1, 1, 0, false}};
  return plan;
}

TEST(KvBudget, SessionsAndTheirSnapshotsNeverNeedMore) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  for (const uint32_t count : {1, 3}) {
    const SizeRequest request{.kv = backend::KvOptions::all(backend::KvFormat::kF32),
                              .alternatives = {},
                              .context = 300,
                              .sessions = count,
                              .ubatch = kUbatch,
                              .snapshots = kTurnSnapshots};
    const Size size = fit(fake_plan(), request, uint64_t{1} << 40);
    FakeBackend backend(kUbatch);  // with room for more, to see what is taken
    backend.before_layer = [&](uint32_t) {
      for (uint32_t g = 0; g < 2; ++g) {
        ASSERT_LE(backend.kv().pages_in_use(g), size.max_kv_pages[g]) << "group " << g;
      }
    };
    Scheduler scheduler(backend, {kVocabulary, size.context, kUbatch});
    std::vector<std::unique_ptr<Session>> sessions;
    for (uint32_t i = 0; i < count; ++i) sessions.push_back(scheduler.new_session());
    // Turns that leave snapshots in the middle of pages, up to the last token of the context.
    for (int turn = 0; turn < 200; ++turn) {
      Session& session = *sessions[random() % count];
      Tokens text(session.tokens().begin(), session.tokens().end());
      if (text.size() == 300 || random() % 8 == 0) {
        session.truncate(static_cast<uint32_t>(random() % 300));
        continue;
      }
      const auto room = std::min<size_t>(300 - text.size(), 90);
      session.sync(joined(text, random_tokens(random, 1 + random() % room)));
    }
  }
}

TEST(KvBudget, SnapshotsAreBoundedAndGoFirstWhenPagesRunOut) {
  std::mt19937_64 random(std::random_device{}());
  // Room for the windows of one session alone; its snapshots must go.
  FakeBackend backend(kUbatch, {4, 20});
  Scheduler scheduler(backend, {kVocabulary, kContext, kUbatch});
  const auto session = scheduler.new_session();
  Tokens text;
  for (int turn = 0; turn < 5; ++turn) {
    text = joined(text, random_tokens(random, 60));
    session->sync(text, 1);
    EXPECT_EQ(last_row(*session), fake_logits(text));
  }

  FakeBackend roomy(kUbatch);
  Scheduler other(roomy, {kVocabulary, kContext, kUbatch});
  const auto free = other.new_session();
  text.clear();
  for (int turn = 0; turn < 30; ++turn) {
    text = joined(text, random_tokens(random, 12));
    free->sync(text);
  }
  const backend::KvGroup& windowed = roomy.kv().groups()[0];
  EXPECT_LE(roomy.kv().pages_in_use(0),
            windowed.pages_for(360, kUbatch) + kTurnSnapshots * windowed.pages_for(360, 0));
}

TEST(KvBudget, ASessionThatFindsNoPagesFailsAlone) {
  std::mt19937_64 random(std::random_device{}());
  FakeBackend backend(kUbatch, {100, 8});  // the full group: 256 positions
  Scheduler scheduler(backend, {kVocabulary, kContext, kUbatch});
  const auto big = scheduler.new_session();
  const auto small = scheduler.new_session();
  const Tokens text = random_tokens(random, 20);
  big->feed(random_tokens(random, 300));
  small->feed(text, 1);
  Session* const both[] = {big.get(), small.get()};
  while (scheduler.step(both)) {
  }
  ASSERT_TRUE(big->error());
  EXPECT_EQ(big->error()->code(), ErrorCode::kOutOfMemory);
  EXPECT_NE(std::string(big->error()->what()).find("all 8 pages of"), std::string::npos)
      << big->error()->what();
  EXPECT_FALSE(small->error());
  EXPECT_EQ(last_row(*small), fake_logits(text));
  EXPECT_EQ(code_of([&] { big->feed(text); }), ErrorCode::kSessionUnusable);
  big->reset();
  big->extend(text, 1);
  EXPECT_EQ(last_row(*big), fake_logits(text));
}

}  // namespace
}  // namespace nibble::engine
