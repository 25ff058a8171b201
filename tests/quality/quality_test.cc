// What the models predict, against the numbers that others reach with the same files.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <boost/json.hpp>
#include <tuple>

#include "e2e/nibble.h"

namespace nibble::test {
namespace {

namespace json = boost::json;

std::string model_path(const std::string& name) {
  return name.starts_with("tiny") ? bundled_model(name + ".gguf").string()
                                  : fixture("models/" + name + ".gguf").string();
}

// `wide` was trained with micro's tokenizer.
std::string heldout_tokens(const std::string& model) {
  const std::string text = model.starts_with("tiny") ? "tiny" : "micro";
  return fixture("golden/" + text + ".heldout_text.tokens.i32").string();
}

json::value eval(const std::string& model, const std::string& backend,
                 std::vector<std::string> options) {
  options.insert(options.begin(), {"eval", model_path(model), "--json", "--backend", backend,
                                   "--tokens", heldout_tokens(model), "--window", "512"});
  const Outcome outcome = nibble(options, "", 550);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  return outcome.exit_code == 0 ? json::parse(outcome.out) : json::value();
}

double number(const json::value& value, std::string_view pointer) {
  return value.at_pointer(pointer).to_number<double>();
}

bool has_device(const std::string& backend) {
  static const std::string devices = nibble({"devices"}).out;
  return devices.starts_with(backend + " ") || devices.find("\n" + backend + " ") != devices.npos;
}

const std::string kBackends[] = {"cuda", "cpu"};

// Of a test with a model, or what is expected of one, and a backend.
template <class Info>
std::string case_name(const Info& info) {
  std::string name = testing::PrintToString(std::get<0>(info.param));
  name = fmt::format("{}_on_{}", name, std::get<1>(info.param));
  std::erase(name, '"');
  std::ranges::replace(name, '-', '_');
  return name;
}

// Mean NLL in 127 windows of 512 tokens: llama.cpp's on a processor, measured when the models were
// made, and our own there (docs/measurements/quality.md).
struct Expected {
  std::string model;
  double llama_cpp_nll, cpu_nll;
};
void PrintTo(const Expected& expected, std::ostream* out) {
  *out << expected.model;
}

class Nll : public testing::TestWithParam<std::tuple<Expected, std::string>> {};

TEST_P(Nll, IsNoWorseThanLlamaCpps) {
  constexpr double kMargin = 0.002, kMarginToCpu = 0.001;  // nats
  const auto& [expected, backend] = GetParam();
  if (!has_device(backend)) GTEST_SKIP() << "this machine has no device for it";
  const json::value result = eval(expected.model, backend, {});
  EXPECT_EQ(number(result, "/predictions"), 127 * 512);
  const double nll = number(result, "/nll");
  fmt::print("{} on {}: nll {:.6f}, llama.cpp {:.6f}\n", expected.model, backend, nll,
             expected.llama_cpp_nll);
  EXPECT_LE(nll, expected.llama_cpp_nll + kMargin);
  EXPECT_LE(nll, expected.cpu_nll + kMarginToCpu);
  // Much better would mean that it was not this text that was predicted.
  EXPECT_GE(nll, expected.llama_cpp_nll - 0.05);
}

INSTANTIATE_TEST_SUITE_P(
    Models, Nll,
    testing::Combine(testing::Values(Expected{"micro-gemma4-f16", 2.411757, 2.411764},
                                     Expected{"micro-gemma4-Q8_0", 2.412558, 2.412350},
                                     Expected{"micro-gemma4-Q6_K", 2.416093, 2.415601},
                                     Expected{"micro-gemma4-Q5_K_M", 2.422389, 2.422198},
                                     Expected{"micro-gemma4-Q4_K_M", 2.447305, 2.446610},
                                     Expected{"micro-gemma4-Q4_0", 2.474888, 2.474884},
                                     Expected{"tiny-gemma4-Q4_K_M", 3.031498, 3.030703},
                                     Expected{"wide-gemma4-Q4_K_M", 2.682496, 2.682207}),
                     testing::ValuesIn(kBackends)),
    case_name<testing::TestParamInfo<Nll::ParamType>>);

// Mean KL against f32 activations and exactly dequantised weights. The bounds are what a correct
// implementation of each activation format measured, with room for another order of summation.
double most_divergence(const std::string& model, std::string_view backend) {
  if (backend == "cuda") return 1e-4;       // f16
  if (model.ends_with("f16")) return 1e-6;  // f32
  return 0.0008;                            // 8 bits, a scale per 32
}

class Divergence : public testing::TestWithParam<std::tuple<std::string, std::string>> {};

TEST_P(Divergence, IsThatOfTheActivationsFormat) {
  const auto& [model, backend] = GetParam();
  if (!has_device(backend)) GTEST_SKIP() << "this machine has no device for it";
  const json::value result =
      eval(model, backend, {"--limit", "8", "--against-backend", "reference"});
  fmt::print("{} on {}: mean KL {:.3g}\n", model, backend, number(result, "/kl/mean"));
  EXPECT_LE(number(result, "/kl/mean"), most_divergence(model, backend));
  EXPECT_GE(number(result, "/top1_agreement"), 0.97);
}

INSTANTIATE_TEST_SUITE_P(
    Models, Divergence,
    testing::Combine(testing::Values("micro-gemma4-f16", "micro-gemma4-Q8_0", "micro-gemma4-Q6_K",
                                     "micro-gemma4-Q5_K_M", "micro-gemma4-Q4_K_M",
                                     "micro-gemma4-Q4_0", "tiny-gemma4-Q4_K_M",
                                     "wide-gemma4-Q4_K_M"),
                     testing::ValuesIn(kBackends)),
    case_name<testing::TestParamInfo<Divergence::ParamType>>);

TEST(F16Cache, DivergesLittle) {
  const json::value result =
      eval("micro-gemma4-f16", "cpu", {"--limit", "8", "--kv", "f16", "--against-kv", "f32"});
  fmt::print("f16 cache: mean KL {:.3g}\n", number(result, "/kl/mean"));
  EXPECT_GT(number(result, "/kl/mean"), 0);
  EXPECT_LE(number(result, "/kl/mean"), 1e-6);
}

}  // namespace
}  // namespace nibble::test
