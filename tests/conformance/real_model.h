#pragma once
// A model of the fixtures and what backends make of it.

#include <gtest/gtest.h>

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include "backend/backend.h"
#include "gguf/gguf_file.h"
#include "model/model.h"
#include "support/expect_error.h"
#include "support/fixtures.h"

namespace nibble::conformance {

using namespace backend;

inline constexpr uint32_t kUbatch = 512;

struct RealModel {
  explicit RealModel(const std::string& name)
      : file(gguf::GgufFile::open(name.starts_with("tiny") ? test::bundled_model(name)
                                                           : test::fixture("models/" + name))),
        plan(model::build_plan(file)) {
    // `wide` was trained with micro's tokenizer.
    const std::string text = name.starts_with("tiny") ? "tiny" : "micro";
    for (int32_t id : test::read_i32(test::fixture("golden/" + text + ".heldout_text.tokens.i32")))
      tokens.push_back({id});
  }
  BackendOptions options(KvFormat format) const { return options(KvOptions::all(format)); }
  BackendOptions options(const KvOptions& kv) const {
    return {.kv = kv,
            .ubatch = kUbatch,
            .threads = 0,
            .device = 0,
            .max_kv_pages = std::vector<uint32_t>(make_kv_groups(plan, {}).size(), 200)};
  }

  const gguf::GgufFile file;
  const Plan plan;
  std::vector<TokenId> tokens;  // English text
};

// Runs `tokens` behind what the sequence holds, `chunk` at a time, and returns all their logits.
inline std::vector<float> prefill(Backend& backend, KvSequence& kv, std::span<const TokenId> tokens,
                                  size_t chunk) {
  std::vector<float> logits;
  for (; !tokens.empty(); tokens = tokens.subspan(std::min(chunk, tokens.size()))) {
    const std::span part = tokens.first(std::min(chunk, tokens.size()));
    const uint32_t count = uint32_t(part.size());
    kv.prepare(count);
    const BatchSequence sequence{part, &kv, count, {}};
    BatchResult result;
    backend.run({.sequences = std::span(&sequence, 1), .stop = {}, .observe = {}}, result);
    kv.commit(count);
    logits.insert(logits.end(), result.logits.begin(), result.logits.end());
  }
  return logits;
}

inline std::vector<float> prefill_fresh(Backend& backend, std::span<const TokenId> tokens,
                                        size_t chunk) {
  KvSequence kv(backend.kv());
  return prefill(backend, kv, tokens, chunk);
}

// Root mean square of the difference, relative to that of the values.
inline double relative_error(std::span<const float> values, std::span<const float> expected) {
  EXPECT_EQ(values.size(), expected.size());
  double error = 0, magnitude = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    error += std::pow(double(values[i]) - expected[i], 2);
    magnitude += std::pow(double(expected[i]), 2);
  }
  return std::sqrt(error / magnitude);
}

// A batch that is stopped halfway leaves the cache as it was: what comes next is the same to the
// bit.
inline void expect_stop_keeps_what_was_committed(Backend& backend, const RealModel& model) {
  const std::span tokens(model.tokens);
  const std::span begin = tokens.first(100), rest = tokens.subspan(100, 60);
  KvSequence undisturbed(backend.kv()), kv(backend.kv());
  prefill(backend, undisturbed, begin, kUbatch);
  prefill(backend, kv, begin, kUbatch);
  const std::vector<float> expected = prefill(backend, undisturbed, rest, kUbatch);

  kv.prepare(uint32_t(rest.size()));
  const BatchSequence sequence{rest, &kv, 1, {}};
  BatchResult result;
  size_t asked = 0;
  const auto stop = [&] { return ++asked > model.plan.steps.size() / 2; };
  test::expect_error(ErrorCode::kCancelled, {"cancelled before step"}, [&] {
    backend.run({.sequences = std::span(&sequence, 1), .stop = stop, .observe = {}}, result);
  });
  EXPECT_EQ(kv.length(), begin.size());
  EXPECT_TRUE(prefill(backend, kv, rest, kUbatch) == expected);
}

}  // namespace nibble::conformance
