// Packed models as a user meets them, on a machine that needs no GPU for it.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <boost/json.hpp>
#include <filesystem>
#include <fstream>

#include "e2e/nibble.h"

namespace nibble::test {
namespace {

class PackedCommands : public testing::Test {
 protected:
  PackedCommands() { std::filesystem::create_directory(folder_); }
  ~PackedCommands() override { std::filesystem::remove_all(folder_); }

  std::string path(std::string_view name) const { return (folder_ / name).string(); }
  std::string packed() const {
    const Outcome outcome = nibble({"pack", micro("Q4_K_M"), "-o", path("packed")});
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    EXPECT_EQ(outcome.out, "");
    return path("packed");
  }

 private:
  const std::filesystem::path folder_ =
      std::filesystem::temp_directory_path() / fmt::format("nibble_e2e_packed.{}", ::getpid());
};

void expect_failure(const Outcome& outcome, const std::vector<std::string>& parts) {
  EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  for (const std::string& part : parts)
    EXPECT_NE(outcome.err.find(part), std::string::npos) << part << " is not in: " << outcome.err;
}

TEST_F(PackedCommands, InspectDescribesAndVerifies) {
  const std::string model = packed();
  const Outcome outcome =
      nibble({"inspect", model, "--verify", "--source", micro("Q4_K_M"), "--json"});
  ASSERT_EQ(outcome.exit_code, 0) << outcome.err;
  const boost::json::value json = boost::json::parse(outcome.out);
  EXPECT_EQ(json.at("bytes").to_number<uint64_t>(), std::filesystem::file_size(model));
  EXPECT_EQ(json.at_pointer("/packed/backend").as_string(), "cuda");
  EXPECT_EQ(json.at_pointer("/packed/source/name").as_string(), "micro-gemma4-Q4_K_M.gguf");
  EXPECT_EQ(json.at_pointer("/packed/layouts").as_array().size(), 2u);
  EXPECT_EQ(json.at_pointer("/memory/0/backend").as_string(), "cuda");

  const Outcome text = nibble({"inspect", model});
  EXPECT_EQ(text.exit_code, 0) << text.err;
  for (const char* part : {"packed model", "cuda", "CudaQ4Tiled", "CudaQ6Tiled", "version 1",
                           "micro-gemma4-Q4_K_M.gguf"}) {
    EXPECT_NE(text.out.find(part), std::string::npos) << part << " is not in: " << text.out;
  }
}

TEST_F(PackedCommands, InspectFindsDamageAndOtherSources) {
  const std::string model = packed();
  expect_failure(nibble({"inspect", model, "--source", micro("Q8_0")}),
                 {"micro-gemma4-Q4_K_M.gguf", "micro-gemma4-Q8_0.gguf"});
  expect_failure(nibble({"inspect", micro("Q8_0"), "--verify"}), {"only packed models"});

  std::string bytes = read_file(model);
  bytes[bytes.size() - 5000] ^= 1;
  std::ofstream(path("damaged"), std::ios::binary) << bytes;
  EXPECT_EQ(nibble({"inspect", path("damaged")}).exit_code, 0);  // weights are not read
  expect_failure(nibble({"inspect", path("damaged"), "--verify"}), {"damaged", "content hash"});
  std::filesystem::resize_file(path("damaged"), bytes.size() / 2);
  expect_failure(nibble({"inspect", path("damaged")}), {"cut short"});
}

TEST_F(PackedCommands, TokensAreTheSourcesAndTheProcessorIsRefused) {
  const std::string model = packed();
  const Outcome tokens = nibble({"tokenize", model}, "A harbour.");
  EXPECT_EQ(tokens.exit_code, 0) << tokens.err;
  EXPECT_EQ(tokens.out, nibble({"tokenize", micro("Q4_K_M")}, "A harbour.").out);
  expect_failure(nibble({"run", model, "--backend", "cpu", "-p", "x"}),
                 {"packed for backend 'cuda'", "'cpu'", "micro-gemma4-Q4_K_M.gguf"});
}

TEST_F(PackedCommands, ProcessorsHaveNoWeightsButTheFiles) {
  const std::vector<std::string> run = {"run", micro("Q4_K_M"), "--raw", "-p",       "A", "-n",
                                        "2",   "--backend",     "cpu",   "--weights"};
  const auto with = [&](const char* weights) {
    std::vector<std::string> arguments = run;
    arguments.push_back(weights);
    return nibble(arguments);
  };
  EXPECT_EQ(with("direct").exit_code, 0);
  expect_failure(with("packed"), {"'cpu'", "packed", "direct"});
}

TEST_F(PackedCommands, AFullDiskLeavesNothingBehind) {
  // A limit on the size of files; ulimit counts in blocks of 512 or 1,024 bytes.
  const std::string command = fmt::format("ulimit -f 1000; exec {} pack {} -o {}", NIBBLE_BINARY,
                                          micro("Q4_K_M"), path("packed"));
  expect_failure(run_program({"/bin/sh", "-c", command}), {"packed.partial", "write"});
  EXPECT_TRUE(std::filesystem::is_empty(path("")));
}

TEST_F(PackedCommands, MistakesAreUsageErrors) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"pack", micro("Q4_0")},
        {"pack", micro("Q4_0"), "-o", path("packed"), "--backend", "cpu"},
        {"pack", micro("Q4_0"), "-o", path("packed"), "--threads", "0"}}) {
    EXPECT_EQ(nibble(arguments).exit_code, 2) << testing::PrintToString(arguments);
  }
  EXPECT_TRUE(std::filesystem::is_empty(path("")));
}

}  // namespace
}  // namespace nibble::test
