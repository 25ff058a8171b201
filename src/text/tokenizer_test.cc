#include "text/tokenizer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <boost/json.hpp>
#include <chrono>
#include <map>
#include <random>
#include <sstream>

#include "base/error.h"
#include "support/expect_error.h"
#include "support/fixtures.h"
#include "support/small_vocabulary.h"

namespace nibble::text {
namespace {

using test::SmallVocabulary;

std::unique_ptr<const Tokenizer> tokenizer_of(const test::GgufBuilder& builder) {
  const auto bytes = builder.build();
  return Tokenizer::from_gguf(gguf::GgufFile::from_bytes(bytes));
}

std::unique_ptr<const Tokenizer> small_tokenizer() {
  return tokenizer_of(SmallVocabulary::standard().file());
}

std::unique_ptr<const Tokenizer> tiny_tokenizer() {
  return Tokenizer::from_gguf(gguf::GgufFile::open(test::bundled_model("tiny-gemma4-Q4_K_M.gguf")));
}

std::vector<TokenId> ids(std::initializer_list<const char*> texts) {
  const auto vocabulary = SmallVocabulary::standard();
  std::vector<TokenId> tokens;
  for (const char* text : texts) tokens.push_back({vocabulary.id(text)});
  return tokens;
}

uint32_t fresh_seed() {
  return std::random_device()();
}

// The ids that llama.cpp gives.
TEST(Tokenizer, AgreesWithLlamaCpp) {
  const auto tokenizer = tiny_tokenizer();
  std::istringstream cases(test::read_file(test::fixture("tokenizer/cases.jsonl")));
  int count = 0;
  for (std::string line; std::getline(cases, line); ++count) {
    const auto entry = boost::json::parse(line);
    const std::string_view text = entry.at("text").as_string();
    std::vector<TokenId> expected;
    for (const auto& id : entry.at("ids").as_array()) {
      expected.push_back({int32_t(id.as_int64())});
    }
    EXPECT_EQ(tokenizer->encode(text, Specials::kParse), expected) << text;
    if (text.find("▁") != std::string_view::npos) continue;  // decoded as a space
    EXPECT_EQ(tokenizer->decode(expected, /*with_specials=*/true), text);
  }
  EXPECT_EQ(count, 91);
}

// What BPE is by definition, one merge at a time: far too slow, but plain to see.
std::vector<std::string> plain_bpe(
    std::vector<std::string> parts,
    const std::map<std::pair<std::string, std::string>, int>& ranks) {
  while (true) {
    int best_rank = INT32_MAX;
    size_t best = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto found = ranks.find({parts[i], parts[i + 1]});
      if (found != ranks.end() && found->second < best_rank) {
        best_rank = found->second;
        best = i;
      }
    }
    if (best_rank == INT32_MAX) return parts;
    parts[best] += parts[best + 1];
    parts.erase(parts.begin() + ptrdiff_t(best) + 1);
  }
}

TEST(Tokenizer, MergesAsBpeIsDefined) {
  const uint32_t seed = fresh_seed();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  // A vocabulary of random merges over four letters, and texts of these letters.
  for (int round = 0; round < 50; ++round) {
    auto vocabulary = SmallVocabulary::standard();
    vocabulary.merges.clear();
    std::vector<std::string> pieces = {"a", "b", "c", "d"};
    std::map<std::pair<std::string, std::string>, int> ranks;
    while (ranks.size() < 40) {
      const auto& left = pieces[random() % pieces.size()];
      const auto& right = pieces[random() % pieces.size()];
      const std::string joined = left + right;
      if (!ranks.try_emplace({left, right}, int(ranks.size())).second) continue;
      vocabulary.add_merge(left, right);
      if (joined.size() <= 8) pieces.push_back(joined);
    }
    const auto tokenizer = tokenizer_of(vocabulary.file());
    for (int i = 0; i < 20; ++i) {
      std::vector<std::string> letters(1 + random() % 60);
      std::string text;
      for (auto& letter : letters) text += letter = pieces[random() % 4];
      std::vector<TokenId> expected;
      for (const auto& part : plain_bpe(letters, ranks)) expected.push_back({vocabulary.id(part)});
      EXPECT_EQ(tokenizer->encode(text, Specials::kText), expected) << text;
    }
  }
}

TEST(Tokenizer, SpacesNewlinesAndBytes) {
  const auto tokenizer = small_tokenizer();
  const auto encode = [&](std::string_view text) {
    return tokenizer->encode(text, Specials::kText);
  };
  EXPECT_EQ(encode(""), ids({}));
  EXPECT_EQ(encode(" ab"), ids({"\u2581ab"}));
  EXPECT_EQ(encode("\u2581ab"), ids({"\u2581ab"}));
  EXPECT_EQ(encode("   "), ids({"\u2581\u2581", "\u2581"}));
  EXPECT_EQ(encode("\n\n"), ids({"\n\n"}));
  EXPECT_EQ(encode("a\n\n\nb"), ids({"a", "\n\n", "\n", "b"}));
  EXPECT_EQ(encode("\u00e9"), ids({"\u00e9"}));
  EXPECT_EQ(encode("\u20ac"), ids({"<0xE2>", "<0x82>", "<0xAC>"}));
  EXPECT_EQ(encode("a\xff\xe2\x82"
                   "b"),
            ids({"a", "<0xFF>", "<0xE2>", "<0x82>", "b"}));
  EXPECT_EQ(encode(std::string_view("\0", 1)), ids({"<0x00>"}));
}

TEST(Tokenizer, ANewlineRunThatIsATokenIsThatToken) {
  auto vocabulary = SmallVocabulary::standard();
  const int32_t four = vocabulary.add("\n\n\n\n");  // no merge leads to it
  EXPECT_EQ(tokenizer_of(vocabulary.file())->encode("\n\n\n\n", Specials::kText),
            std::vector<TokenId>{{four}});
}

TEST(Tokenizer, SpecialsAreCutOutLongestFirst) {
  const auto tokenizer = small_tokenizer();
  EXPECT_EQ(tokenizer->encode("a<b>!<b>b<|turn><unk><|turn", Specials::kParse),
            ids({"a", "<b>!", "<b>", "b", "<|turn>", "<unk>", "<", "|", "t", "u", "r", "n"}));
  EXPECT_EQ(tokenizer->encode("<|turn>", Specials::kParse), ids({"<|turn>"}));
}

TEST(Tokenizer, UserTextThatSpellsASpecialStaysText) {
  const auto vocabulary = SmallVocabulary::standard();
  const auto tokenizer = tokenizer_of(vocabulary.file());
  for (size_t id = 0; id < vocabulary.tokens.size(); ++id) {
    if (vocabulary.types[id] == SmallVocabulary::kNormal) continue;
    const std::string& text = vocabulary.tokens[id];
    const auto tokens = tokenizer->encode(text, Specials::kText);
    const bool shared = text == "<b>" || text == "<b>!";  // user-defined, no marker
    EXPECT_EQ(tokens == std::vector<TokenId>{{int32_t(id)}}, shared) << text;
    EXPECT_EQ(tokenizer->decode(tokens, /*with_specials=*/false), text);
  }
}

TEST(Tokenizer, MergesCannotMakeASpecial) {
  auto vocabulary = SmallVocabulary::standard();
  for (const char* text : {"|t", "<|t", "<|tu", "<|tur", "<|turn"}) vocabulary.add(text);
  vocabulary.merges = {"| t", "< |t", "<|t u", "<|tu r", "<|tur n", "<|turn >"};
  const int32_t bell = vocabulary.add("\a", SmallVocabulary::kControl);
  const auto tokenizer = tokenizer_of(vocabulary.file());
  EXPECT_EQ(tokenizer->encode("<|turn>\a", Specials::kText),
            (std::vector<TokenId>{
                {vocabulary.id("<|turn")}, {vocabulary.id(">")}, {vocabulary.id("<0x07>")}}));
  EXPECT_EQ(tokenizer->encode("\a", Specials::kParse), std::vector<TokenId>{{bell}});
}

TEST(Tokenizer, KnowsItsSpecialTokens) {
  const auto vocabulary = SmallVocabulary::standard();
  const auto tokenizer = tokenizer_of(vocabulary.file().u32("tokenizer.ggml.eot_token_id", 20));
  EXPECT_EQ(tokenizer->vocabulary(), vocabulary.tokens.size());
  EXPECT_EQ(tokenizer->bos(), TokenId{2});
  for (int32_t id = -1; id <= int32_t(vocabulary.tokens.size()); ++id) {
    const bool ends = id == 1 || id == 20 || id == vocabulary.id("<turn|>") ||
                      id == vocabulary.id("<|tool_response>");
    EXPECT_EQ(tokenizer->is_end_of_generation({id}), ends) << id;
  }
  EXPECT_TRUE(tokenizer->is_special({vocabulary.id("<|turn>")}));
  EXPECT_TRUE(tokenizer->is_special({vocabulary.id("<unk>")}));
  EXPECT_FALSE(tokenizer->is_special({vocabulary.id("<b>")}));
  EXPECT_FALSE(tokenizer->is_special({vocabulary.id("a")}));
  EXPECT_FALSE(tokenizer->is_special({-1}));
  EXPECT_EQ(tokenizer->find("ab"), TokenId{vocabulary.id("ab")});
  EXPECT_EQ(tokenizer->find("no such"), std::nullopt);
}

TEST(Tokenizer, PiecesAndDecode) {
  const auto tokenizer = small_tokenizer();
  const auto vocabulary = SmallVocabulary::standard();
  EXPECT_EQ(tokenizer->piece({vocabulary.id("\u2581ab")}), " ab");
  EXPECT_EQ(tokenizer->piece({vocabulary.id("<0x41>")}), "A");
  EXPECT_EQ(tokenizer->piece({vocabulary.id("<|turn>")}), "<|turn>");
  const auto tokens = ids({"<bos>", "a", "<|turn>", "b", "<b>", "<unk>"});
  EXPECT_EQ(tokenizer->decode(tokens, /*with_specials=*/true), "<bos>a<|turn>b<b><unk>");
  EXPECT_EQ(tokenizer->decode(tokens, /*with_specials=*/false), "ab<b>");
  EXPECT_EQ(tokenizer->decode(ids({"<0xE2>", "<0x82>", "a", "<0xFF>"}), false), "\uFFFDa\uFFFD");
  for (int32_t id : {-1, int32_t(vocabulary.tokens.size()), INT32_MAX, INT32_MIN}) {
    try {
      tokenizer->piece({id});
      ADD_FAILURE() << id;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kInvalidArgument);
    }
  }
}

// Random text of all planes; no marks, which decode to spaces.
std::string random_text(std::mt19937& random, size_t characters) {
  std::string text;
  while (characters-- > 0) {
    constexpr uint32_t kLimits[] = {0x80, 0x80, 0x80, 0x800, 0x10000, 0x110000};
    const uint32_t code = random() % kLimits[random() % std::size(kLimits)];
    if ((code >= 0xd800 && code < 0xe000) || code == 0x2581) continue;
    if (code < 0x80) {
      text += char(code);
      continue;
    }
    if (code >= 0x10000) text += char(0xf0 | code >> 18);
    if (code >= 0x10000) text += char(0x80 | ((code >> 12) & 0x3f));
    if (code >= 0x800 && code < 0x10000) text += char(0xe0 | code >> 12);
    text += char(code >= 0x800 ? 0x80 | ((code >> 6) & 0x3f) : 0xc0 | code >> 6);
    text += char(0x80 | (code & 0x3f));
  }
  return text;
}

TEST(Tokenizer, DecodeGivesTheTextBack) {
  const uint32_t seed = fresh_seed();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const auto tokenizer = tiny_tokenizer();
  for (int round = 0; round < 200; ++round) {
    const std::string text = random_text(random, random() % 100);
    EXPECT_EQ(tokenizer->decode(tokenizer->encode(text, Specials::kText), false), text);
  }
}

TEST(Decoder, NeverEmitsHalfACharacter) {
  const auto tokenizer = small_tokenizer();
  const std::string text = "x\u00e9\u20ac\U0001f469\u200d\U0001f467z";
  Decoder decoder(*tokenizer, /*with_specials=*/false);
  std::string seen;
  size_t given = 0;
  for (char byte : text) {  // every byte a token
    const auto token = TokenId{ids({"<0x00>"})[0].value + uint8_t(byte)};
    seen += decoder.push(token);
    ++given;
    // All that is whole by now, and nothing of what is not.
    const bool boundary = given == text.size() || (uint8_t(text[given]) & 0xc0) != 0x80;
    size_t whole = given;
    if (!boundary) {
      while ((uint8_t(text[whole]) & 0xc0) == 0x80) --whole;
    }
    EXPECT_EQ(seen, text.substr(0, whole));
  }
  EXPECT_EQ(decoder.finish(), "");
}

TEST(Decoder, BrokenBytesBecomeReplacements) {
  const auto tokenizer = small_tokenizer();
  Decoder decoder(*tokenizer, /*with_specials=*/false);
  const auto push = [&](const char* token) { return decoder.push(ids({token})[0]); };
  EXPECT_EQ(push("<0x80>"), "\uFFFD");
  EXPECT_EQ(push("<0xE2>"), "");
  EXPECT_EQ(push("<0x82>"), "");
  EXPECT_EQ(push("<eos>"), "");
  EXPECT_EQ(push("a"), "\uFFFDa");
  EXPECT_EQ(push("<0xF0>"), "");
  EXPECT_EQ(push("<0xF0>"), "\uFFFD");
  EXPECT_EQ(push("<0x9F>"), "");
  EXPECT_EQ(decoder.finish(), "\uFFFD");
  EXPECT_EQ(decoder.finish(), "");
  EXPECT_EQ(push("a"), "a");
}

// Anything quadratic would take hours; instrumented builds get time for their instruments.
#if defined(__has_feature)
#define NIBBLE_TEST_HAS_FEATURE(feature) __has_feature(feature)
#else
#define NIBBLE_TEST_HAS_FEATURE(feature) 0
#endif
#if !defined(NDEBUG) || defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || \
    NIBBLE_TEST_HAS_FEATURE(address_sanitizer) || NIBBLE_TEST_HAS_FEATURE(thread_sanitizer)
constexpr double kSecondsForAMegabyte = 30;
#else
constexpr double kSecondsForAMegabyte = 2;
#endif

TEST(Tokenizer, AMegabyteOfOneThing) {
  const auto tokenizer = tiny_tokenizer();
  std::mt19937 random(1);
  std::string noise(1 << 20, 0);
  for (char& byte : noise) byte = char(random());
  std::string face;
  while (face.size() < 1 << 20) face += "\U0001f600";
  std::string almost;
  while (almost.size() < 1 << 20) almost += "<|tool_respons";
  for (const std::string& text :
       {std::string(1 << 20, 'e'), std::string(1 << 20, '\n'), std::string(1 << 20, ' '),
        std::string(1 << 20, '<'), std::string(1 << 20, '0'), noise, face, almost}) {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_FALSE(tokenizer->encode(text, Specials::kParse).empty());
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
    EXPECT_LT(taken.count(), kSecondsForAMegabyte) << "of " << text.substr(0, 14);
  }
}

// ---- Files that do not fit together ----

void expect_refused(const test::GgufBuilder& builder, const std::string& message,
                    ErrorCode code = ErrorCode::kMalformedFile) {
  test::expect_error(code, {message}, [&] { tokenizer_of(builder); });
}

TEST(TokenizerFile, NoVocabularyAndOtherModels) {
  EXPECT_EQ(tokenizer_of(test::GgufBuilder().string("tokenizer.ggml.model", "no_vocab")), nullptr);
  expect_refused(test::GgufBuilder().string("tokenizer.ggml.model", "llama"), "\"gemma4\"",
                 ErrorCode::kUnsupported);
  expect_refused(test::GgufBuilder(), "tokenizer.ggml.model");
}

TEST(TokenizerFile, MissingOrEmptyArrays) {
  const auto model = [] { return test::GgufBuilder().string("tokenizer.ggml.model", "gemma4"); };
  expect_refused(model(), "tokenizer.ggml.tokens is missing");
  expect_refused(SmallVocabulary().file(), "tokenizer.ggml.tokens is empty");
  expect_refused(model().string_array("tokenizer.ggml.tokens", {"a"}), "token_type is missing");
  expect_refused(model()
                     .string_array("tokenizer.ggml.tokens", {"a"})
                     .i32_array("tokenizer.ggml.token_type", {1}),
                 "merges is missing");
  expect_refused(model().u32_array("tokenizer.ggml.tokens", {1, 2, 3}), "tokenizer.ggml.tokens");
}

TEST(TokenizerFile, SpecialIdsOutsideTheVocabulary) {
  const auto vocabulary = SmallVocabulary::standard();
  const auto size = uint32_t(vocabulary.tokens.size());
  for (const char* name : {"bos", "eos", "eot", "unknown", "padding", "mask", "fim_pre"}) {
    const std::string key = std::string("tokenizer.ggml.") + name + "_token_id";
    EXPECT_NE(tokenizer_of(vocabulary.file().u32(key, size - 1)), nullptr);
    expect_refused(vocabulary.file().u32(key, size), key);
    expect_refused(vocabulary.file().u32(key, UINT32_MAX), key);
    expect_refused(vocabulary.file().i32(key, -1), key);
    expect_refused(vocabulary.file().u64(key, uint64_t{1} << 32), key);
    expect_refused(vocabulary.file().string(key, "2"), key);
  }
}

TEST(TokenizerFile, DefaultIdsOutsideTheVocabulary) {
  SmallVocabulary two;
  two.add("a");
  two.add("b");
  expect_refused(two.file(), "bos_token_id is missing, and its default 2");
  EXPECT_NE(tokenizer_of(two.file().u32("tokenizer.ggml.bos_token_id", 0)), nullptr);
  SmallVocabulary one;
  one.add("a");
  expect_refused(one.file().u32("tokenizer.ggml.bos_token_id", 0),
                 "eos_token_id is missing, and its default 1");
}

TEST(TokenizerFile, ScoresAndTypesOfAnotherLength) {
  const auto vocabulary = SmallVocabulary::standard();
  const size_t size = vocabulary.tokens.size();
  EXPECT_NE(
      tokenizer_of(vocabulary.file().f32_array("tokenizer.ggml.scores", std::vector<float>(size))),
      nullptr);
  for (size_t length : {size_t{0}, size - 1, size + 1}) {
    expect_refused(vocabulary.file().f32_array("tokenizer.ggml.scores", std::vector<float>(length)),
                   "tokenizer.ggml.scores has");
    auto other = vocabulary;
    other.types.resize(length, 1);
    expect_refused(other.file(), "tokenizer.ggml.token_type has");
  }
}

TEST(TokenizerFile, UnknownTypes) {
  for (int32_t type : {-1, 7, 262}) {
    auto vocabulary = SmallVocabulary::standard();
    vocabulary.types.back() = type;
    expect_refused(vocabulary.file(), "has the type");
  }
}

TEST(TokenizerFile, MisspelledByteTokens) {
  for (const char* text : {"<0x-1>", "<0x1>", "<0x123>", "<0xG0>", "<0x 1>", "<0X41>", "0x41", "",
                           "<0x41", "<0x+1>", "<0x0x>"}) {
    auto vocabulary = SmallVocabulary::standard();
    vocabulary.add(text, SmallVocabulary::kByte);
    expect_refused(vocabulary.file(), "of the type byte");
  }
}

TEST(TokenizerFile, MergesThatNameNoToken) {
  for (const char* merge : {"a nothing", "nothing a", "a z", "a", "", " ", "a ", " a", "a b c"}) {
    auto vocabulary = SmallVocabulary::standard();
    vocabulary.merges.push_back(merge);
    expect_refused(vocabulary.file(), "merge 7");
  }
}

TEST(TokenizerFile, RepeatedAndEmptyTokens) {
  auto vocabulary = SmallVocabulary::standard();
  const int32_t a = vocabulary.id("a"), turn = vocabulary.id("<|turn>");
  vocabulary.add("a");
  vocabulary.add("<|turn>", SmallVocabulary::kControl);
  vocabulary.add("<0x41>", SmallVocabulary::kByte);
  for (int32_t type : {0, 1, 2, 3, 4, 5}) vocabulary.add("", type);
  vocabulary.merges.push_back(vocabulary.merges[0]);
  const auto tokenizer = tokenizer_of(vocabulary.file());
  EXPECT_EQ(tokenizer->encode("a<|turn>A", Specials::kParse),
            (std::vector<TokenId>{{a}, {turn}, {vocabulary.id("<0x41>")}}));
  EXPECT_EQ(tokenizer->encode("a b", Specials::kText), ids({"a", "\u2581", "b"}));
  EXPECT_EQ(tokenizer->piece({int32_t(vocabulary.tokens.size()) - 1}), "");
}

TEST(TokenizerFile, CharactersWithoutByteTokens) {
  SmallVocabulary vocabulary;
  for (const char* text : {"<unk>", "<eos>", "<bos>", "a", "<0xE2>"}) vocabulary.add(text);
  vocabulary.types = {SmallVocabulary::kUnknown, 3, 3, 1, SmallVocabulary::kByte};

  const auto known = tokenizer_of(vocabulary.file().u32("tokenizer.ggml.unknown_token_id", 0));
  EXPECT_EQ(known->encode("a\u20ac a", Specials::kText),
            (std::vector<TokenId>{{3}, {0}, {0}, {3}}));

  const auto unknown = tokenizer_of(vocabulary.file());
  EXPECT_EQ(unknown->encode("aa", Specials::kText), (std::vector<TokenId>{{3}, {3}}));
  try {
    unknown->encode("a\u20ac", Specials::kText);
    ADD_FAILURE();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kUnsupported);
    EXPECT_NE(std::string_view(error.what()).find("0x82"), std::string_view::npos) << error.what();
  }
}

TEST(TokenizerFile, SpecialsTooLongToMatch) {
  for (size_t length : {256, 257}) {
    auto vocabulary = SmallVocabulary::standard();
    vocabulary.add(std::string(length, 'q'), SmallVocabulary::kUserDefined);
    if (length > 256) {
      expect_refused(vocabulary.file(), "257 bytes long");
    } else {
      EXPECT_NE(tokenizer_of(vocabulary.file()), nullptr);
    }
  }
}

}  // namespace
}  // namespace nibble::text
