#pragma once
// For tests: a backend whose "model" is made of hashes, but which keeps its state in KV pages as a
// real one does, so that every mistake with pages, positions or sessions changes its logits.

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "backend/backend.h"
#include "base/error.h"

namespace nibble::engine::test {

inline constexpr uint32_t kVocabulary = 97;
inline constexpr uint32_t kWindow = 64;
// Each layer stores a hash of its input and reads all stored ones that its window shows, so the
// last layer's state goes back several windows, as a transformer's does.
inline constexpr uint32_t kWindows[] = {kWindow, 0};    // of the KV groups
inline constexpr uint32_t kGroupOfLayer[] = {0, 0, 1};  // the layers' KV groups
inline constexpr uint32_t kPlaceInGroup[] = {0, 1, 0};  // and places in their pages
inline constexpr uint32_t kLayers = 3;

inline uint64_t hash(uint64_t a, uint64_t b) {
  uint64_t x = (a ^ (b + 0x9e3779b97f4a7c15)) * 0xff51afd7ed558ccd;
  x = (x ^ (x >> 32)) * 0xc4ceb9fe1a85ec53;
  return x ^ (x >> 29);
}

// The new state of a layer at `position`, from its input there and what it stored at all positions.
template <class Stored>  // uint64_t stored(uint32_t position)
uint64_t layer_output(uint32_t layer, uint64_t input, uint32_t position, const Stored& stored) {
  const uint32_t window = kWindows[kGroupOfLayer[layer]];
  const uint32_t first = window == 0 || position < window ? 0 : position - window + 1;
  uint64_t state = hash(input, layer);
  for (uint32_t p = first; p <= position; ++p) state = hash(state, stored(p) + position - p);
  return state;
}

inline uint64_t embedding(TokenId token, uint32_t position) {
  return hash(static_cast<uint64_t>(token.value), position);
}

inline std::vector<float> logits_of(uint64_t state) {
  std::vector<float> logits(kVocabulary);
  for (uint32_t i = 0; i < kVocabulary; ++i) {
    logits[i] = static_cast<float>(hash(state, i) % 10'007) * 1e-3f;
  }
  return logits;
}

// The logits after the last token of `tokens`, computed without any cache.
inline std::vector<float> fake_logits(std::span<const TokenId> tokens) {
  std::vector<uint64_t> states;
  for (uint32_t p = 0; p < tokens.size(); ++p) states.push_back(embedding(tokens[p], p));
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    const std::vector<uint64_t> stored = states;
    for (uint32_t p = 0; p < states.size(); ++p) {
      states[p] = layer_output(layer, stored[p], p, [&](uint32_t i) { return stored[i]; });
    }
  }
  return logits_of(states.back());
}

// Pages that hold garbage until they are written.
class FakeKvStore : public backend::KvStore {
 public:
  explicit FakeKvStore(std::vector<uint32_t> max_pages)
      : KvStore({group(kWindows[0]), group(kWindows[1])}, std::move(max_pages)) {}

  std::function<void()> before_copy;  // may throw

  void copy_page(uint32_t group, backend::PageId from, backend::PageId to) override {
    if (before_copy) before_copy();
    pages_[group][to.value] = pages_[group][from.value];
  }

  uint64_t& state(uint32_t layer, const backend::KvSequence& kv, uint32_t position) {
    const uint32_t group = kGroupOfLayer[layer];
    const backend::PageId page = kv.table(group).at(position / backend::kKvPageTokens);
    return pages_[group].at(page.value)[kPlaceInGroup[layer] * backend::kKvPageTokens +
                                        position % backend::kKvPageTokens];
  }

 protected:
  void add_page(uint32_t group, backend::PageId page) override {
    std::vector<uint64_t>& states = pages_[group].emplace_back(2 * backend::kKvPageTokens);
    for (size_t i = 0; i < states.size(); ++i) states[i] = hash(page.value, i);
  }

 private:
  static backend::KvGroup group(uint32_t window) {
    return {.window = window, .layers = {}, .page_bytes = 512};
  }
  std::vector<std::vector<uint64_t>> pages_[2];  // [group][page][layer, position]
};

class FakeBackend : public backend::Backend {
 public:
  explicit FakeBackend(uint32_t ubatch, std::vector<uint32_t> max_pages = {1000, 1000})
      : ubatch_(ubatch), kv_(std::move(max_pages)) {}

  std::string description() const override { return "fake"; }
  FakeKvStore& kv() override { return kv_; }
  backend::MemoryUse memory() const override { return {}; }

  void run(const backend::Batch& batch, backend::BatchResult& result) override {
    std::vector<size_t> counts;
    size_t total = 0;
    for (const backend::BatchSequence& sequence : batch.sequences) {
      counts.push_back(sequence.tokens.size());
      total += sequence.tokens.size();
    }
    NIBBLE_CHECK(total > 0 && total <= ubatch_);
    batches.push_back(std::move(counts));

    std::vector<std::vector<uint64_t>> states;
    for (const backend::BatchSequence& sequence : batch.sequences) {
      std::vector<uint64_t>& rows = states.emplace_back();
      for (TokenId token : sequence.tokens) {
        rows.push_back(embedding(token, sequence.kv->length() + uint32_t(rows.size())));
      }
    }
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      if (before_layer) before_layer(layer);
      if (batch.stop && batch.stop()) fail(ErrorCode::kCancelled, "cancelled");
      for (size_t s = 0; s < states.size(); ++s) {
        run_layer(layer, *batch.sequences[s].kv, states[s]);
      }
    }
    for (size_t s = 0; s < states.size(); ++s) finish(batch.sequences[s], states[s], result);
  }

  std::vector<std::vector<size_t>> batches;          // of each run, the sequences' token counts
  std::function<void(uint32_t layer)> before_layer;  // may throw
  std::optional<TokenId> nan_token;                  // nothing can be drawn after it

 private:
  void run_layer(uint32_t layer, const backend::KvSequence& kv, std::vector<uint64_t>& states) {
    const uint32_t start = kv.length();
    for (uint32_t i = 0; i < states.size(); ++i) kv_.state(layer, kv, start + i) = states[i];
    for (uint32_t i = 0; i < states.size(); ++i) {
      states[i] = layer_output(layer, states[i], start + i,
                               [&](uint32_t p) { return kv_.state(layer, kv, p); });
    }
  }

  void finish(const backend::BatchSequence& sequence, std::span<const uint64_t> states,
              backend::BatchResult& result) {
    for (uint64_t state : states.last(sequence.logit_rows)) {
      const std::vector<float> logits = logits_of(state);
      result.logits.insert(result.logits.end(), logits.begin(), logits.end());
    }
    if (sequence.sample) {
      std::vector<float> logits = logits_of(states.back());
      if (sequence.tokens.back() == nan_token) {
        std::fill(logits.begin(), logits.end(), std::numeric_limits<float>::quiet_NaN());
      }
      result.sampled.push_back(backend::sample(logits, *sequence.sample));
    }
  }

  uint32_t ubatch_;
  FakeKvStore kv_;
};

}  // namespace nibble::engine::test
