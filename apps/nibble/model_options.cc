#include "nibble/model_options.h"

#include <fmt/format.h>
#ifdef __APPLE__
#include <mach-o/dyld.h>
#endif

#include <algorithm>
#include <cmath>
#include <utility>

#include "base/error.h"
#include "engine/packed_model.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

constexpr const char* kGroup = "Model and device";
constexpr std::string_view kBundledModel = "tiny-gemma4-Q4_K_M.gguf";

std::filesystem::path executable() {
  std::error_code ignored;
#ifdef __APPLE__
  char buffer[4096];
  uint32_t size = sizeof buffer;
  if (_NSGetExecutablePath(buffer, &size) != 0) return {};
  return std::filesystem::canonical(buffer, ignored);
#else
  return std::filesystem::read_symlink("/proc/self/exe", ignored);
#endif
}

[[noreturn]] void fail_without_tokenizer() {
  fail(ErrorCode::kUnsupported,
       "this file has no tokenizer (tokenizer.ggml.model is \"no_vocab\"), so it can't read or "
       "write text; it works with bench, inspect, logits and eval");
}

}  // namespace

CLI::Validator finite_between(double low, double high) {
  const auto check = [low, high](const std::string& text) -> std::string {
    double value;
    if (CLI::detail::lexical_cast(text, value) && std::isfinite(value) && value >= low &&
        value <= high) {
      return "";
    }
    return fmt::format("{} is not a number from {} to {}", text, low, high);
  };
  return CLI::Validator(check, "");
}

CLI::Validator is_kv_format(std::vector<std::string> more) {
  for (const backend::KvFormat format : backend::kKvFormats) more.emplace_back(to_string(format));
  return CLI::IsMember(std::move(more)).description("");
}

void add_model(CLI::App& command, std::string& model) {
  command.add_option("MODEL", model, "GGUF file or packed model; left out: the bundled tiny model");
}

std::filesystem::path model_path(const std::string& model) {
  if (!model.empty()) return model;
  const std::filesystem::path places[] = {
      executable().parent_path().parent_path() / "share" / "nibble" / kBundledModel,
      std::filesystem::path(NIBBLE_SOURCE_MODELS) / kBundledModel,
  };
  for (const std::filesystem::path& place : places) {
    std::error_code ignored;
    if (std::filesystem::is_regular_file(place, ignored)) return place;
  }
  fail(ErrorCode::kIo, "no MODEL given, and the bundled one is neither {} nor {}; name a GGUF file",
       places[0].string(), places[1].string());
}

void ModelOptions::add_to(CLI::App& command) {
  add_model(command, model);
  command
      .add_option("--backend", backend,
                  "What runs the model: auto, cuda, cpu, reference (plain and slow)")
      ->check(CLI::IsMember({"auto", "cpu", "cuda", "metal", "reference"}).description(""))
      ->type_name("NAME")
      ->group(kGroup);
  command.add_option("--device", device, "Which device of that backend")
      ->type_name("N")
      ->group(kGroup);
  command
      .add_option(
          "--weights", weights,
          "How weights are kept: auto (the faster), direct (as in the file), packed (in the "
          "backend's own layout)")
      ->check(CLI::IsMember({"auto", "direct", "packed"}).description(""))
      ->type_name("LAYOUT")
      ->group(kGroup);
  command
      .add_option(
          "--kv", kv,
          "Format of keys and values in the cache: auto (f16, beyond a context of 8192 q8), "
          "f16, q8, tq4, f32")
      ->check(is_kv_format({"auto"}))
      ->type_name("FORMAT")
      ->group(kGroup);
  command
      .add_option("--kv-window", kv_window,
                  "The same for layers with a sliding window; left out: f16, or f32 with --kv f32")
      ->check(is_kv_format({"auto"}))
      ->type_name("FORMAT")
      ->group(kGroup);
  command
      .add_option("--kv-layout", kv_layout,
                  "Rows of the cache: auto (one for key and value where the model allows), split")
      ->check(CLI::IsMember({"auto", "split"}).description(""))
      ->type_name("LAYOUT")
      ->group(kGroup);
  command.add_option("--threads", threads, "Threads; left out: one per core")
      ->check(finite_between(1, 1024))
      ->type_name("N")
      ->group(kGroup);
  command
      .add_option("--ubatch", ubatch, "Most tokens in one step; left out: 1024 on CUDA, else 512")
      ->check(finite_between(1, 65536))
      ->type_name("TOKENS")
      ->group(kGroup);
  command.add_flag("-v,--verbose", verbose, "Say more on stderr")->group(kGroup);
}

void ModelOptions::add_context_to(CLI::App& command) {
  command
      .add_option("-c,--context", context,
                  "Most tokens of a conversation; left out: the trained context or what fits")
      ->check(finite_between(1, INT32_MAX))
      ->type_name("TOKENS")
      ->group(kGroup);
}

engine::EngineOptions ModelOptions::engine_options() const {
  engine::EngineOptions options;
  options.snapshots = 0;
  options.backend = backend;
  if (weights == "direct") options.weights = backend::WeightStorage::kDirect;
  if (weights == "packed") options.weights = backend::WeightStorage::kPacked;
  options.kv_format = backend::kv_format_of(kv);
  options.kv_window_format = backend::kv_format_of(kv_window);
  if (kv_layout == "split") options.kv_layout = backend::KvLayout::kSplit;
  options.context = context;
  options.threads = threads;
  options.ubatch = ubatch;
  options.device = device;
  return options;
}

void prefer_exact_kv(engine::EngineOptions& options) {
  const auto formats = engine::kv_formats(options.backend);
  const bool has_f32 = std::ranges::count(formats, backend::KvFormat::kF32) > 0;
  if (!options.kv_format)
    options.kv_format = has_f32 ? backend::KvFormat::kF32 : backend::KvFormat::kF16;
}

OpenModel open_model(const ModelOptions& options, const engine::EngineOptions& engine_options) {
  const std::filesystem::path path = model_path(options.model);
  OpenModel opened;
  const Stopwatch watch;
  {
    ProgressBar bar;
    opened.engine = engine::Engine::open(path, engine_options, bar.callback());
  }
  opened.load_ms = watch.ms();
  engine::Engine& engine = *opened.engine;
  fmt::print(stderr, "{} on {}; context {}\n", printable(path.filename().string()),
             printable(engine.backend().description()), engine.context());
  if (options.verbose) {
    const backend::MemoryUse memory = engine.backend().memory();
    fmt::print(stderr, "opened in {:.0f} ms: {} of weights, cache {}, up to {} tokens a step\n",
               opened.load_ms, human_bytes(memory.weights_bytes),
               describe_kv(engine.backend().kv().groups()), engine.ubatch());
  }
  return opened;
}

const text::Tokenizer& require_tokenizer(const engine::Engine& engine) {
  if (const text::Tokenizer* tokenizer = engine.tokenizer()) return *tokenizer;
  fail_without_tokenizer();
}

std::unique_ptr<const text::Tokenizer> open_tokenizer(const std::string& model) {
  auto tokenizer = text::Tokenizer::from_gguf(engine::ModelFile::open(model_path(model)).gguf());
  if (!tokenizer) fail_without_tokenizer();
  return tokenizer;
}

uint32_t logit_rows_at_once(const engine::Engine& engine) {
  constexpr uint64_t kMaxBytes = 256'000'000;
  const uint64_t row_bytes = uint64_t{engine.plan().vocabulary} * sizeof(float);
  return uint32_t(std::max<uint64_t>(1, kMaxBytes / row_bytes));
}

}  // namespace nibble::app
