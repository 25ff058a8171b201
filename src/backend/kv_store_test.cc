#include "backend/kv_store.h"

#include <gtest/gtest.h>

#include <new>
#include <random>
#include <utility>

#include "base/error.h"

namespace nibble::backend {
namespace {

constexpr uint32_t kUnbounded = 0;

KvGroup group_of(uint32_t window) {
  return {.window = window, .layers = {}, .page_bytes = 1000};
}

// Pages of plain integers, one per position.
class TestStore : public KvStore {
 public:
  TestStore(std::vector<uint32_t> windows, uint32_t max_pages = 1000)
      : KvStore(groups_of(windows), std::vector<uint32_t>(windows.size(), max_pages)),
        pages_(windows.size()) {}

  void copy_page(uint32_t group, PageId from, PageId to) override {
    pages_[group][to.value] = pages_[group][from.value];
    ++copies;
  }
  int& at(uint32_t group, const KvSequence& sequence, uint32_t position) {
    const PageId page = sequence.table(group)[position / kKvPageTokens];
    return pages_[group].at(page.value)[position % kKvPageTokens];
  }

  int copies = 0;
  bool refuse_memory = false;

 protected:
  void add_page(uint32_t group, PageId page) override {
    if (refuse_memory) throw std::bad_alloc();
    EXPECT_EQ(page.value, pages_[group].size());
    pages_[group].emplace_back(kKvPageTokens, -1);
  }

 private:
  static std::vector<KvGroup> groups_of(const std::vector<uint32_t>& windows) {
    std::vector<KvGroup> groups;
    for (uint32_t window : windows) groups.push_back(group_of(window));
    return groups;
  }
  std::vector<std::vector<std::vector<int>>> pages_;
};

// Appends `count` positions that hold first, first + 1, ... in every group.
void append(TestStore& store, KvSequence& sequence, uint32_t count, int first) {
  sequence.prepare(count);
  for (uint32_t g = 0; g < store.groups().size(); ++g) {
    for (uint32_t i = 0; i < count; ++i) {
      store.at(g, sequence, sequence.length() + i) = first + static_cast<int>(i);
    }
  }
  sequence.commit(count);
}

TEST(KvStore, PagesAreCountedAndReused) {
  TestStore store({kUnbounded});
  const PageId a = store.allocate(0);
  const PageId b = store.allocate(0);
  EXPECT_NE(a, b);
  store.retain(0, a);
  store.release(0, a);
  EXPECT_EQ(store.references(0, a), 1u);
  EXPECT_EQ(store.pages_in_use(0), 2u);
  store.release(0, a);
  EXPECT_EQ(store.pages_in_use(0), 1u);
  EXPECT_EQ(store.allocate(0), a);
  EXPECT_EQ(store.allocated_bytes(), 2000u);
}

TEST(KvStore, RunningOutSaysTheNumbers) {
  TestStore store({kUnbounded, 64}, 2);
  const auto refusal = [&](uint32_t group) -> std::string {
    try {
      store.allocate(group);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
      return error.what();
    }
    ADD_FAILURE() << "a third page of two";
    return "";
  };
  store.allocate(1);
  store.allocate(1);
  EXPECT_NE(refusal(1).find("all 2 pages of 1000 bytes for layers with a window of 64 are taken"),
            std::string::npos);
  store.allocate(0);  // the other group has its own
  store.allocate(0);
  EXPECT_NE(refusal(0).find("for layers without a window"), std::string::npos);
}

TEST(KvStore, RefusedMemoryIsAnErrorAndCostsNothing) {
  TestStore store({kUnbounded});
  store.refuse_memory = true;
  try {
    store.allocate(0);
    FAIL() << "memory was refused";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kOutOfMemory);
  }
  EXPECT_EQ(store.allocated_bytes(), 0u);
  store.refuse_memory = false;
  EXPECT_EQ(store.allocate(0), PageId{0});
}

TEST(KvSequence, CopiesShareUntilOneWrites) {
  TestStore store({kUnbounded});
  KvSequence a(store);
  append(store, a, 40, 0);
  KvSequence b = a;
  EXPECT_EQ(store.pages_in_use(0), 2u);
  append(store, b, 1, 1000);
  EXPECT_EQ(store.copies, 1);
  append(store, a, 1, 2000);
  EXPECT_EQ(store.copies, 1) << "the page is a's alone again";
  EXPECT_EQ(store.pages_in_use(0), 3u);
  for (uint32_t i = 0; i < 40; ++i) {
    EXPECT_EQ(store.at(0, a, i), int(i));
    EXPECT_EQ(store.at(0, b, i), int(i));
  }
  EXPECT_EQ(store.at(0, a, 40), 2000);
  EXPECT_EQ(store.at(0, b, 40), 1000);
}

TEST(KvSequence, FullSharedPagesAreNotCopied) {
  TestStore store({kUnbounded});
  KvSequence a(store);
  append(store, a, 2 * kKvPageTokens, 0);
  KvSequence b = a;
  append(store, b, 1, 1000);
  EXPECT_EQ(store.copies, 0);
}

TEST(KvSequence, AbandonedPreparationMayBeRepeatedSmallerOrLarger) {
  TestStore store({kUnbounded, 32});
  KvSequence a(store);
  append(store, a, 10, 0);
  a.prepare(100);
  a.prepare(1);
  KvSequence b = a;  // shares prepared pages, too
  append(store, a, 60, 10);
  append(store, b, 60, 500);
  EXPECT_EQ(store.at(0, a, 69), 69);
  EXPECT_EQ(store.at(0, b, 69), 559);
  EXPECT_EQ(store.at(0, b, 9), 9);
}

TEST(KvSequence, FailedPreparationLeavesEverythingAsItWas) {
  TestStore store({kUnbounded, 32}, 3);
  KvSequence a(store);
  append(store, a, 40, 0);
  KvSequence shared = a;
  for (uint32_t tokens : {40u, 90u, 1000u}) {
    const auto tables = std::pair(a.table(0), a.table(1));
    const auto in_use = std::pair(store.pages_in_use(0), store.pages_in_use(1));
    EXPECT_THROW(a.prepare(tokens), Error);
    EXPECT_EQ(std::pair(a.table(0), a.table(1)), tables);
    EXPECT_EQ(std::pair(store.pages_in_use(0), store.pages_in_use(1)), in_use);
  }
  append(store, a, 10, 40);
  for (uint32_t i = 0; i < 50; ++i) EXPECT_EQ(store.at(0, a, i), int(i));
}

TEST(KvSequence, CommitReleasesWhatNoWindowSees) {
  constexpr uint32_t kWindow = 40;
  TestStore store({kWindow});
  KvSequence sequence(store);
  for (uint32_t length = 1; length <= 300; ++length) {
    append(store, sequence, 1, static_cast<int>(length - 1));
    for (uint32_t page = 0; page < sequence.table(0).size(); ++page) {
      // The next query stands at `length` and sees positions above length - window.
      const bool visible = int((page + 1) * kKvPageTokens) - 1 > int(length) - int(kWindow);
      EXPECT_EQ(sequence.table(0)[page] != kNoPage, visible) << length << " " << page;
    }
    EXPECT_LE(store.pages_in_use(0), group_of(kWindow).pages_for(length, 1));
  }
}

TEST(KvSequence, StaysWithinPagesForWhateverTheSteps) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  for (int round = 0; round < 50; ++round) {
    const auto window = static_cast<uint32_t>(1 + random() % 150);
    const auto ubatch = static_cast<uint32_t>(1 + random() % 100);
    TestStore store({window, kUnbounded});
    KvSequence sequence(store);
    for (int step = 0; step < 20; ++step) {
      const auto tokens = static_cast<uint32_t>(1 + random() % ubatch);
      sequence.prepare(tokens);
      for (uint32_t g = 0; g < 2; ++g) {
        EXPECT_LE(store.pages_in_use(g),
                  store.groups()[g].pages_for(sequence.length() + tokens, ubatch))
            << "window " << store.groups()[g].window << " ubatch " << ubatch;
      }
      sequence.commit(tokens);
    }
  }
}

TEST(KvSequence, CanTruncateWhileTheWindowsPagesSurvive) {
  TestStore store({kUnbounded, 64});
  KvSequence sequence(store);
  append(store, sequence, 100, 0);
  append(store, sequence, 100, 100);
  // At 200 the window starts at 137: pages 0 to 3 ([0, 128)) are gone.
  for (uint32_t length = 1; length <= 200; ++length) {
    const bool survives = int(length) - 64 + 1 >= 128;
    EXPECT_EQ(sequence.can_truncate(length), survives) << length;
  }
  EXPECT_TRUE(sequence.can_truncate(0));
  EXPECT_FALSE(sequence.can_truncate(201));

  sequence.truncate(195);
  append(store, sequence, 10, 5000);
  EXPECT_EQ(store.at(1, sequence, 194), 194);
  EXPECT_EQ(store.at(1, sequence, 195), 5000);
  EXPECT_EQ(sequence.length(), 205u);
  sequence.truncate(0);
  EXPECT_EQ(store.pages_in_use(0) + store.pages_in_use(1), 0u);
}

TEST(KvSequence, TruncationOfOneLeavesItsCopyAlone) {
  TestStore store({kUnbounded, 64});
  KvSequence a(store);
  append(store, a, 50, 0);
  const KvSequence snapshot = a;
  a.truncate(20);
  append(store, a, 30, 700);
  for (uint32_t i = 0; i < 50; ++i) EXPECT_EQ(store.at(1, snapshot, i), int(i));
  EXPECT_EQ(store.at(1, a, 20), 700);
  EXPECT_EQ(store.at(1, a, 19), 19);
}

// A model test: random operations on sequences that share pages against plain vectors of ints.
TEST(KvSequence, RandomSharingKeepsEachSequencesContents) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  TestStore store({kUnbounded, 50});
  {
    std::vector<std::pair<KvSequence, std::vector<int>>> live;
    live.emplace_back(KvSequence(store), std::vector<int>());
    int next = 0;
    for (int step = 0; step < 2000; ++step) {
      const size_t which = random() % live.size();
      auto& [sequence, expected] = live[which];
      const auto action = random() % 10;
      if (action < 5) {
        const auto tokens = static_cast<uint32_t>(1 + random() % 40);
        append(store, sequence, tokens, next);
        for (uint32_t i = 0; i < tokens; ++i) expected.push_back(next++);
      } else if (action < 7 && live.size() < 6) {
        live.emplace_back(live[which]);
      } else if (action < 9) {
        const auto length = static_cast<uint32_t>(random() % (expected.size() + 1));
        if (sequence.can_truncate(length)) {
          sequence.truncate(length);
          expected.resize(length);
        }
      } else if (live.size() > 1) {
        std::swap(live[which], live.back());
        live.pop_back();
      }
      for (auto& [s, values] : live) {
        ASSERT_EQ(s.length(), values.size());
        for (uint32_t g = 0; g < 2; ++g) {
          const uint32_t window = store.groups()[g].window;
          const uint32_t begin = window == 0 || s.length() < window ? 0 : s.length() - window + 1;
          for (uint32_t i = begin; i < s.length(); ++i) ASSERT_EQ(store.at(g, s, i), values[i]);
        }
      }
    }
  }
  EXPECT_EQ(store.pages_in_use(0) + store.pages_in_use(1), 0u);
}

}  // namespace
}  // namespace nibble::backend
