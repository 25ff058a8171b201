// The commands as a user meets them: output, exit codes, what goes where.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/json.hpp>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>

#include "e2e/nibble.h"
#include "support/small_gemma4.h"

namespace nibble::test {
namespace {

namespace json = boost::json;

// The outcome of a run that must succeed, parsed.
json::value parsed(const Outcome& outcome) {
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  return outcome.exit_code == 0 ? json::parse(outcome.out) : json::value();
}

double number(const json::value& value, std::string_view pointer) {
  return value.at_pointer(pointer).to_number<double>();
}

void expect_failure(const Outcome& outcome, const std::string& part_of_message) {
  EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_NE(outcome.err.find(part_of_message), std::string::npos) << outcome.err;
}

void expect_usage_error(const std::vector<std::string>& arguments) {
  SCOPED_TRACE(testing::PrintToString(arguments));
  const Outcome outcome = nibble(arguments, "x");
  EXPECT_EQ(outcome.exit_code, 2) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_NE(outcome.err, "");
}

class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& contents = "") {
    std::ofstream(path_, std::ios::binary) << contents;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  static inline int made_ = 0;
  std::filesystem::path path_ =
      std::filesystem::temp_directory_path() / fmt::format("nibble_e2e.{}.{}", ::getpid(), ++made_);
};

const std::vector<std::string> kQuestion = {"run", "-p", "Define freedom.", "-n", "24"};

std::vector<std::string> question(std::vector<std::string> more) {
  more.insert(more.begin(), kQuestion.begin(), kQuestion.end());
  return more;
}

TEST(Run, GreedyTextIsTheSameEachTime) {
  const Outcome first = nibble(question({tiny(), "--temp", "0"}));
  const Outcome second = nibble(question({tiny(), "--temp", "0", "--seed", "9"}));
  ASSERT_EQ(first.exit_code, 0) << first.err;
  EXPECT_GT(first.out.size(), 20u);
  EXPECT_EQ(first.out.back(), '\n');
  EXPECT_EQ(first.out, second.out);
}

TEST(Run, ContinuesTheGoldenPromptAsTheModelWasTrainedTo) {
  const json::value golden = json::parse(read_file(fixture("golden/chat.json")));
  const json::value answer = parsed(nibble(
      {"run", micro("f16"), "-p", "What is the Debian package curl?", "--temp", "0", "--json"}));
  const json::array& expected = golden.at("greedy").as_array();
  const json::array& tokens = answer.at("tokens").as_array();
  ASSERT_GE(tokens.size(), expected.size());
  EXPECT_EQ(json::array(tokens.begin(), tokens.begin() + long(expected.size())), expected);
  EXPECT_EQ(answer.at("prompt_tokens"), golden.at("tokens").as_array().size());
  EXPECT_EQ(answer.at("finish_reason"), "stop");
}

TEST(Run, TakesEveryCacheFormatInEitherLayout) {
  const json::value golden = json::parse(read_file(fixture("golden/chat.json")));
  const size_t count = golden.at("greedy").as_array().size();
  for (const std::string kv : {"f16", "q8", "tq4"}) {
    for (const std::string layout : {"auto", "split"}) {
      SCOPED_TRACE(kv + " " + layout);
      const json::value answer = parsed(nibble(
          {"run", micro("f16"), "-p", "What is the Debian package curl?", "--temp", "0", "--json",
           "--backend", "cpu", "--kv", kv, "--kv-window", kv, "--kv-layout", layout}));
      json::array tokens = answer.at("tokens").as_array();
      ASSERT_GE(tokens.size(), count / 2);
      tokens.resize(std::min(tokens.size(), count));
      // Four bits may choose another word.
      if (kv != "tq4") {
        EXPECT_EQ(tokens, golden.at("greedy").as_array());
      }
    }
  }
}

TEST(Run, SameSeedSameTextAnotherSeedAnotherText) {
  const auto ask = [](const std::string& seed) {
    const Outcome outcome = nibble(question({"--temp", "1", "--seed", seed}));
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return outcome.out;
  };
  const std::string first = ask("7");
  EXPECT_EQ(first, ask("7"));
  EXPECT_NE(first, ask("8"));
}

TEST(Run, JsonHasTheFixedShape) {
  const json::value answer = parsed(nibble(question({"--json", "--seed", "3"})));
  EXPECT_TRUE(answer.at("text").is_string());
  EXPECT_LE(answer.at("tokens").as_array().size(), 24u);
  EXPECT_GT(number(answer, "/prompt_tokens"), 0);
  EXPECT_TRUE(answer.at("finish_reason") == "stop" || answer.at("finish_reason") == "length");
  for (const char* timing : {"load_ms", "prefill_ms", "decode_ms", "decode_tokens_per_s"}) {
    EXPECT_GE(number(answer, fmt::format("/timings/{}", timing)), 0) << timing;
  }
  EXPECT_TRUE(answer.at("backend").is_string());
}

TEST(Run, StopsAtTheAskedLengthAndAtTheFullContext) {
  const json::value none = parsed(nibble({"run", "-p", "Hello", "-n", "0", "--json"}));
  EXPECT_EQ(none.at("tokens").as_array().size(), 0u);
  EXPECT_EQ(none.at("finish_reason"), "length");

  const json::value full = parsed(nibble({"run", "--raw", "-p", "The", "-c", "16", "--json",
                                          "--logit-bias", "1=-1e6", "--logit-bias", "6=-1e6"}));
  // The last token is drawn at the full context and needs no room of its own.
  EXPECT_EQ(full.at("tokens").as_array().size() + size_t(number(full, "/prompt_tokens")), 17u);
  EXPECT_EQ(full.at("finish_reason"), "length");
}

TEST(Run, PromptComesFromFileOrStdinToo) {
  const TemporaryFile file("Define freedom.");
  const Outcome given = nibble(question({"--temp", "0"}));
  const Outcome from_file = nibble({"run", "-f", file.path(), "-n", "24", "--temp", "0"});
  const Outcome from_stdin = nibble({"run", "-n", "24", "--temp", "0"}, "Define freedom.");
  ASSERT_EQ(given.exit_code, 0) << given.err;
  EXPECT_EQ(given.out, from_file.out);
  EXPECT_EQ(given.out, from_stdin.out);
}

TEST(Run, SystemTextStandsBeforeThePrompt) {
  const auto prompt_tokens = [](std::vector<std::string> options) {
    options.insert(options.begin(), {"run", "-p", "x", "-n", "0", "--json"});
    return number(parsed(nibble(options)), "/prompt_tokens");
  };
  EXPECT_GT(prompt_tokens({"--system", "Be brief."}), prompt_tokens({}) + 3);
}

TEST(Run, PenaltiesAndBiasChangeTheAnswer) {
  const std::string plain = nibble(question({"--temp", "0"})).out;
  EXPECT_NE(nibble(question({"--temp", "0", "--frequency-penalty", "20"})).out, plain);
  EXPECT_NE(nibble(question({"--temp", "0", "--presence-penalty", "20"})).out, plain);
  EXPECT_NE(nibble(question({"--temp", "0", "--repeat-penalty", "9"})).out, plain);
  const json::value biased = parsed(nibble(question({"--logit-bias", "525=1e6", "--json"})));
  for (const json::value& token : biased.at("tokens").as_array()) EXPECT_EQ(token, 525);
}

TEST(Run, SaysBothNumbersWhenThePromptIsLongerThanTheContext) {
  std::string prompt;
  for (int i = 0; i < 100; ++i) prompt += "harbour ";
  const Outcome outcome = nibble({"run", "--raw", "-p", prompt, "-c", "64"});
  expect_failure(outcome, "64");
  const json::array ids =
      json::parse(nibble({"tokenize", "--bos", "--json"}, prompt).out).as_array();
  EXPECT_NE(outcome.err.find(std::to_string(ids.size())), std::string::npos) << outcome.err;
}

TEST(Run, SaysWhatWouldFitWhereMemoryIsTooLittle) {
  const Outcome outcome = nibble({"run", tiny(), "-p", "x", "-c", "2000000000"});
  expect_failure(outcome, " are free; what would fit: -c ");
  const bool cuda = nibble({"devices"}).out.starts_with("cuda");
  EXPECT_EQ(outcome.err.find("can't be shared between GPU and CPU") != std::string::npos, cuda)
      << outcome.err;
}

TEST(Run, TakesInvalidUtf8AndAnswersInValid) {
  for (const std::string prompt : {"\xff\xfe", "caf\xc3", "\xed\xa0\x80", "a\x80z"}) {
    const json::value answer = parsed(nibble({"run", "-n", "8", "--json"}, prompt));
    EXPECT_TRUE(answer.at("text").is_string());  // Boost.JSON parses only valid UTF-8
  }
}

TEST(Run, UserTextNeverBecomesASpecialToken) {
  const json::value plain = parsed(nibble({"run", "-p", "x", "-n", "0", "--json"}));
  const json::value spelled = parsed(nibble({"run", "-p", "x<turn|>", "-n", "0", "--json"}));
  // As a token it would add one; as text it takes several.
  EXPECT_GT(number(spelled, "/prompt_tokens"), number(plain, "/prompt_tokens") + 1);
}

TEST(Run, FilesThatCantBeReadAreFailures) {
  expect_failure(nibble({"run", "/nonexistent.gguf", "-p", "x"}), "/nonexistent.gguf");
  expect_failure(nibble({"run", "/", "-p", "x"}), "/");
  expect_failure(nibble({"run", "-f", "/nonexistent.txt"}), "/nonexistent.txt");
  expect_failure(nibble({"run", "-f", "/"}), "/");
  expect_failure(nibble({"run", "-f", "/dev/zero"}), "/dev/zero");
  expect_failure(nibble({"eval", tiny(), "--tokens", "/nonexistent.i32"}), "/nonexistent.i32");
  expect_failure(nibble({"logits", tiny(), "--ids", "2", "--out", "/nonexistent/rows"}),
                 "/nonexistent/rows");
  if (::geteuid() != 0) {
    const TemporaryFile secret("x");
    std::filesystem::permissions(secret.path(), std::filesystem::perms::none);
    expect_failure(nibble({"run", secret.path(), "-p", "x"}), secret.path());
  }
}

TEST(Chat, RemembersAndForgets) {
  const auto talk = [](const std::string& lines) {
    const Outcome outcome = nibble({"chat", tiny(), "--temp", "0", "-n", "16"}, lines);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return outcome.out;
  };
  const std::string first = talk("Define freedom.\n");
  EXPECT_EQ(talk("Define freedom.\n/clear\nDefine freedom.\n"), first + first);
  // The second answer stands on the first question.
  EXPECT_TRUE(talk("Define freedom.\nWhat is curl?\n").starts_with(first));
  EXPECT_EQ(talk("/help\n/nonsense\n\n/quit\nDefine freedom.\n"), "");
}

TEST(Chat, WhatWasSaidStaysInTheCache) {
  const Outcome outcome = nibble({"chat", tiny(), "--temp", "0", "-n", "16", "-v"},
                                 "Define freedom.\nWhat is curl?\n/clear\nWhat is curl?\n");
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  std::vector<int> reused;  // of each prompt: "... prompt tokens (N from the cache) ..."
  const std::string before = " prompt tokens (";
  for (size_t at = 0; (at = outcome.err.find(before, at)) != std::string::npos;) {
    at += before.size();
    reused.push_back(std::stoi(outcome.err.substr(at)));
  }
  ASSERT_EQ(reused.size(), 3u) << outcome.err;
  EXPECT_EQ(reused[0], 0);
  EXPECT_GE(reused[1], 16);  // the first question and most of its answer
  EXPECT_LT(reused[2], 8);   // BOS and the opening of the turn
}

TEST(Tokenize, GivesTheIdsOfAllCasesAndBack) {
  std::ifstream cases(fixture("tokenizer/cases.jsonl"));
  size_t count = 0;
  for (std::string line; std::getline(cases, line) && count < 40; ++count) {
    SCOPED_TRACE(line);
    const json::value expected = json::parse(line);
    const std::string text(expected.at("text").as_string());
    const Outcome ids = nibble({"tokenize", tiny(), "--json"}, text);
    EXPECT_EQ(parsed(ids), expected.at("ids"));
    EXPECT_EQ(nibble({"detokenize", tiny()}, ids.out).out, text);
    const Outcome plain = nibble({"tokenize", tiny()}, text);
    EXPECT_EQ(nibble({"detokenize", tiny()}, plain.out).out, text);
  }
  EXPECT_GT(count, 10u);
}

TEST(Tokenize, OptionsChangeWhatSpecialsBecome) {
  const auto ids = [](std::vector<std::string> options) {
    options.insert(options.begin(), {"tokenize", tiny(), "--json"});
    return parsed(nibble(options, "<turn|>")).as_array();
  };
  EXPECT_EQ(ids({}), (json::array{6}));
  EXPECT_EQ(ids({"--bos"}), (json::array{2, 6}));
  EXPECT_GT(ids({"--no-special"}).size(), 1u);
}

TEST(Detokenize, RefusesWhatIsNoId) {
  for (const char* input : {"x", "[1, \"a\"]", "[1", "99999999", "-1", "[[1]]", "1.5"}) {
    SCOPED_TRACE(input);
    const Outcome outcome = nibble({"detokenize", tiny()}, input);
    EXPECT_EQ(outcome.exit_code, 1);
    EXPECT_EQ(outcome.out, "");
    EXPECT_NE(outcome.err, "");
  }
}

TEST(Eval, PredictsLikeTheGoldenModel) {
  const std::string tokens = fixture("golden/micro.heldout_text.tokens.i32").string();
  const json::value result = parsed(nibble({"eval", micro("Q8_0"), "--tokens", tokens, "--limit",
                                            "4", "--against", micro("f16"), "--json"}));
  EXPECT_EQ(number(result, "/predictions"), 4 * 512);
  EXPECT_NEAR(number(result, "/nll"), 2.41, 0.4);  // 2.4126 over all 127 windows
  EXPECT_NEAR(number(result, "/ppl"), std::exp(number(result, "/nll")), 1e-6);
  const double mean = number(result, "/kl/mean"), p99 = number(result, "/kl/p99");
  EXPECT_GT(mean, 0);
  EXPECT_LT(mean, p99);
  EXPECT_LE(p99, number(result, "/kl/max"));
  EXPECT_GT(number(result, "/top1_agreement"), 0.95);
}

TEST(Eval, AModelDoesNotDifferFromItself) {
  const std::string tokens = fixture("golden/micro.heldout_text.tokens.i32").string();
  const json::value result = parsed(nibble({"eval", micro("Q4_0"), "--tokens", tokens, "--limit",
                                            "1", "--against", micro("Q4_0"), "--json"}));
  EXPECT_EQ(number(result, "/kl/max"), 0);
  EXPECT_EQ(number(result, "/top1_agreement"), 1);
}

TEST(Eval, TheReferenceHasAnExactCacheWhateverIsMeasured) {
  const std::string tokens = fixture("golden/micro.heldout_text.tokens.i32").string();
  const auto largest_kl = [&](const std::vector<std::string>& options) {
    std::vector<std::string> arguments = {
        "eval", micro("f16"), "--tokens", tokens, "--window",          "64",       "--limit",
        "1",    "--json",     "--kv",     "f16",  "--against-backend", "reference"};
    arguments.insert(arguments.end(), options.begin(), options.end());
    return number(parsed(nibble(arguments)), "/kl/max");
  };
  EXPECT_EQ(largest_kl({}), largest_kl({"--against-kv", "f32"}));
  EXPECT_NE(largest_kl({}), largest_kl({"--against-kv", "f16"}));
}

TEST(Eval, RefusesTokenFilesThatDontFit) {
  const auto eval = [](const std::string& bytes) {
    const TemporaryFile file(bytes);
    return nibble({"eval", micro("Q4_0"), "--tokens", file.path(), "--window", "2"});
  };
  using namespace std::string_literals;
  expect_failure(eval("\2\0\0\0\2\0\0"s), "7 bytes");
  expect_failure(eval("\2\0\0\0\2\0\0\0\xff\xff\xff\xff"s), "-1");
  expect_failure(eval("\2\0\0\0\0\x10\0\0\2\0\0\0"s), "4096");
  expect_failure(eval("\2\0\0\0\2\0\0\0"s), "2 tokens");
  expect_failure(eval(""), "0 tokens");
}

TEST(Logits, WritesTheRowsOfTheLastPositions) {
  const json::value golden = json::parse(read_file(fixture("golden/chat.json")));
  std::string ids;
  for (const json::value& id : golden.at("tokens").as_array()) {
    ids += fmt::format("{}{}", ids.empty() ? "" : ",", json::serialize(id));
  }
  const TemporaryFile rows;
  const Outcome outcome =
      nibble({"logits", micro("f16"), "--ids", ids, "--last", "8", "--out", rows.path()});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  const std::vector<float> expected = read_f32(fixture("golden/chat.logits.f32"));
  const std::vector<float> found = read_f32(rows.path());
  ASSERT_EQ(found.size(), expected.size());
  // What the backend with the roughest activations may be off.
  for (size_t i = 0; i < found.size(); ++i) ASSERT_NEAR(found[i], expected[i], 0.02) << i;
}

TEST(Inspect, ShowsMetadataTensorsAndMemory) {
  const Outcome text = nibble({"inspect", tiny()});
  ASSERT_EQ(text.exit_code, 0) << text.err;
  for (const char* part : {"general.architecture", "token_embd.weight", "Q6_K", "context"}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part;
  }
  const json::value result = parsed(nibble({"inspect", tiny(), "--json"}));
  EXPECT_EQ(result.at_pointer("/metadata/general.architecture"), "gemma4");
  EXPECT_EQ(result.at_pointer("/metadata/tokenizer.ggml.tokens/count"), 8192);
  EXPECT_GT(result.at("tensors").as_array().size(), 80u);
  // Of each backend, format and context: a line, bytes, and of GPUs the card that holds them.
  std::map<std::string, double> kv_bytes;
  for (const json::value& row : result.at("memory").as_array()) {
    double total = 0;
    for (const char* part : {"weights", "kv", "workspace", "driver"})
      total += number(row, fmt::format("/{}_bytes", part));
    EXPECT_EQ(number(row, "/total_bytes"), total);
    const bool cuda = row.at("backend") == "cuda";
    EXPECT_EQ(number(row, "/driver_bytes") > 0, cuda);
    ASSERT_EQ(row.as_object().contains("smallest_card_gb"), cuda);
    if (cuda) {
      EXPECT_GE(1e9 * number(row, "/smallest_card_gb"), total);
    }
    kv_bytes[fmt::format("{} {} {}", row.at("backend").as_string().c_str(),
                         row.at("kv").as_string().c_str(), number(row, "/context"))] =
        number(row, "/kv_bytes");
  }
  EXPECT_EQ(kv_bytes.size(), 2u * (3 + 4));  // f32 is the CPU's alone
  for (const std::string backend : {"cuda ", "cpu "}) {
    for (const std::string context : {" 512", " 2048"}) {
      const auto bytes = [&](const char* kv) { return kv_bytes.at(backend + kv + context); };
      EXPECT_LT(bytes("tq4"), bytes("q8"));
      EXPECT_LT(bytes("q8"), bytes("f16"));
    }
    for (const std::string kv : {"f16", "q8", "tq4"})
      EXPECT_LT(kv_bytes.at(backend + kv + " 512"), kv_bytes.at(backend + kv + " 2048"));
  }
}

// What `bench` says of the cache.
std::string cache_of(const std::string& model, std::vector<std::string> options) {
  const TemporaryFile file;
  options.insert(options.begin(), {"bench", model, "--context", "64", "--generate", "4",
                                   "--backend", "cpu", "--json", file.path()});
  const Outcome outcome = nibble(options);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  const json::value result = json::parse(read_file(file.path()));
  return std::string(result.at_pointer("/config/kv").as_string());
}

TEST(Bench, SaysHowKeysAndValuesAreStored) {
  const auto cache = [](std::vector<std::string> options) {
    return cache_of(micro("f16"), std::move(options));
  };
  EXPECT_EQ(cache({}), "f16 in shared rows, f16 in windows");
  EXPECT_EQ(cache({"--kv", "tq4", "--kv-window", "q8"}), "tq4 in shared rows, q8 in windows");
  EXPECT_EQ(cache({"--kv", "q8", "--kv-layout", "split"}), "q8, f16 in windows");
}

TEST(Bench, ProfilingDoesNotChangeTheCache) {
  const TemporaryFile model;
  small_gemma4({.head_dim_sliding = 64, .head_dim_full = 64}).write(model.path());
  EXPECT_EQ(cache_of(model.path(), {"--capacity", "8193"}), "q8, f16 in windows");
  // The profile's steps end beyond 8,192.
  EXPECT_EQ(cache_of(model.path(), {"--profile", "--ubatch", "8192"}), "f16");
}

TEST(Bench, AProfileHasThePeaksThatItIsComparedWith) {
  const TemporaryFile file;
  const Outcome outcome = nibble({"bench", micro("Q4_K_M"), "--context", "64", "--generate", "4",
                                  "--profile", "--json", file.path()});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const json::value result = json::parse(read_file(file.path()));
  EXPECT_GT(number(result, "/read_bytes_per_s"), 0);
  const bool cuda = result.at("device").as_string().starts_with("cuda");
  EXPECT_EQ(number(result, "/matrix_flops_per_s") > 1e12, cuda);
  for (const char* step : {"decode", "prefill"}) {
    const json::array& entries = result.at("profile").at(step).as_array();
    EXPECT_EQ(entries.empty(), !cuda);
    for (const json::value& entry : entries) EXPECT_GT(number(entry, "/us_per_step"), 0);
  }
  EXPECT_EQ(outcome.out.find("of peak") != std::string::npos, cuda) << outcome.out;
  EXPECT_EQ(outcome.out.find("has no profile") != std::string::npos, !cuda) << outcome.out;
}

TEST(Bench, BackendsThatThisBuildLacksAreNamed) {
  expect_failure(nibble({"bench", micro("f16"), "--backend", "metal", "--profile"}), "'metal'");
}

TEST(Bench, MeasuresEachContextAndBatch) {
  const TemporaryFile file;
  const Outcome outcome = nibble({"bench", micro("Q4_K_M"), "--context", "64,128", "--generate",
                                  "4", "--batch", "1,3", "--json", file.path()});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  EXPECT_NE(outcome.out.find("GB/s"), std::string::npos);
  const json::value result = json::parse(read_file(file.path()));
  ASSERT_EQ(result.at("points").as_array().size(), 4u);
  for (const json::value& point : result.at("points").as_array()) {
    for (const char* key : {"context", "prefill_tokens_per_s", "decode_tokens_per_s", "decode_ms",
                            "bytes_per_token", "bandwidth_fraction"}) {
      EXPECT_GT(number(point, fmt::format("/{}", key)), 0) << key;
    }
  }
  for (const char* key : {"weights_bytes", "kv_bytes", "peak_bytes"}) {
    EXPECT_GT(number(result, fmt::format("/memory/{}", key)), 0) << key;
  }
  EXPECT_TRUE(result.at("device").is_string());
  EXPECT_TRUE(result.at("commit").is_string());
  EXPECT_GT(number(result, "/load_ms"), 0);
}

TEST(NoTokenizer, WorksWithAllThatNeedsNoText) {
  const TemporaryFile model;
  small_gemma4({.head_dim_sliding = 64, .head_dim_full = 64}).write(model.path());
  const Outcome run = nibble({"run", model.path(), "-p", "x"});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_NE(run.err.find("no tokenizer"), std::string::npos) << run.err;
  expect_failure(nibble({"tokenize", model.path()}, "x"), "no tokenizer");

  const auto expect_works = [](const Outcome& outcome) {
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  };
  expect_works(nibble({"inspect", model.path()}));
  expect_works(nibble({"bench", model.path(), "--context", "16", "--generate", "4"}));
  const TemporaryFile rows, tokens(std::string(64, '\0'));
  expect_works(nibble({"logits", model.path(), "--ids", "1,2,3", "--out", rows.path()}));
  expect_works(nibble({"eval", model.path(), "--tokens", tokens.path(), "--window", "4"}));
}

TEST(Devices, ListsTheProcessor) {
  const Outcome outcome = nibble({"devices"});
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  // The last line: devices of better backends come before it.
  EXPECT_EQ(outcome.out.find("cpu 0"), outcome.out.rfind('\n', outcome.out.size() - 2) + 1)
      << outcome.out;
}

TEST(Usage, MistakesGiveExitCode2) {
  expect_usage_error({});
  expect_usage_error({"walk"});
  expect_usage_error({"run", "--nonsense"});
  expect_usage_error({"run", "-p", "a", "-f", "b"});
  expect_usage_error({"run", "-p", "a", "-n", "-1"});
  expect_usage_error({"run", "-p", "a", "-n", "many"});
  expect_usage_error({"run", "-p", "a", "--temp", "nan"});
  expect_usage_error({"run", "-p", "a", "--temp", "-1"});
  expect_usage_error({"run", "-p", "a", "--top-p", "1.5"});
  expect_usage_error({"run", "-p", "a", "--min-p", "inf"});
  expect_usage_error({"run", "-p", "a", "--logit-bias", "5"});
  expect_usage_error({"run", "-p", "a", "--seed", "-1"});
  expect_usage_error({"run", "-p", "a", "--seed", "18446744073709551616"});
  expect_usage_error({"run", "-p", "a", "--raw", "--system", "b"});
  expect_usage_error({"run", "-p", "a", "--backend", "abacus"});
  expect_usage_error({"run", "-p", "a", "--kv", "f8"});
  expect_usage_error({"run", "-p", "a", "-c", "0"});
  expect_usage_error({"run", "one.gguf", "two.gguf", "-p", "a"});
  expect_usage_error({"eval", "model.gguf"});
  expect_usage_error({"eval", "model.gguf", "--tokens", "x", "--window", "0"});
  expect_usage_error({"logits", "model.gguf", "--out", "x"});
  expect_usage_error({"logits", "model.gguf", "--ids", "2,x", "--out", "y"});
  expect_usage_error({"logits", "model.gguf", "--ids", "", "--out", "y"});
  expect_usage_error({"bench", "model.gguf", "--context", "512,"});
  expect_usage_error({"bench", "model.gguf", "--context", "64", "--generate", "64"});
}

TEST(Usage, HelpGoesToStdout) {
  for (const std::string command : {"run", "chat", "eval", "logits", "tokenize", "detokenize",
                                    "inspect", "pack", "bench", "devices"}) {
    const Outcome outcome = nibble({command, "--help"});
    EXPECT_EQ(outcome.exit_code, 0) << command;
    EXPECT_EQ(outcome.err, "") << command;
    EXPECT_NE(outcome.out.find("Usage"), std::string::npos) << command;
    EXPECT_NE(outcome.out.find("Example"), std::string::npos) << command;
  }
}

}  // namespace
}  // namespace nibble::test
