#include "engine/engine.h"

#include <algorithm>
#include <limits>
#include <set>
#include <utility>

#include "base/memory.h"
#include "cpu/cpu_backend.h"
#ifdef NIBBLE_HAS_CUDA
#include "cuda/cuda_backend.h"
#endif
#include "engine/memory.h"
#include "engine/packed_model.h"
#include "engine/sampling_defaults.h"
#include "engine/scheduler.h"
#include "reference/reference_backend.h"

namespace nibble::engine {
namespace {

constexpr uint32_t kMaxUbatch = 65536;
constexpr uint32_t kMaxSessions = 65536;

// Reads one byte of every page, so that the file's time on the disk shows as progress here instead
// of as a slow first token.
void page_in(const backend::Plan& plan, const Progress& progress) {
  constexpr size_t kPage = 4096;
  constexpr uint64_t kReportEvery = uint64_t{64} << 20;
  const uint64_t total = plan.weight_bytes();
  uint64_t done = 0;
  uint64_t reported = 0;
  std::set<const std::byte*> seen;
  for (const backend::Weight& weight : plan.weights) {
    for (const backend::WeightSegment& segment : weight.segments) {
      if (!seen.insert(segment.data.data()).second) continue;
      for (size_t at = 0; at < segment.data.size(); at += kPage) {
        static_cast<void>(*static_cast<const volatile std::byte*>(&segment.data[at]));
        if (progress && done + at - reported >= kReportEvery) {
          reported = done + at;
          progress("loading", reported, total);
        }
      }
      done += segment.data.size();
    }
  }
  if (progress) progress("loading", total, total);
}

// A backend that this build has.
struct BackendKind {
  std::string_view name;
  uint32_t (*devices)();
  uint64_t (*free_bytes)(const backend::Plan&, backend::WeightStorage, uint32_t device);
  std::unique_ptr<backend::Backend> (*make)(const backend::Plan&, const backend::BackendOptions&,
                                            const Progress&);
  // The first one where none is asked for.
  std::vector<backend::WeightStorage> weights = {backend::WeightStorage::kDirect};
  std::string_view memory_advice = "";  // when memory is short
};

// One that reads weights where the file's mapping has them.
template <auto kMake>
std::unique_ptr<backend::Backend> make_on_host(const backend::Plan& plan,
                                               const backend::BackendOptions& options,
                                               const Progress& progress) {
  page_in(plan, progress);
  return kMake(plan, options);
}
uint32_t one_device() {
  return 1;
}
uint64_t free_host_bytes(const backend::Plan&, backend::WeightStorage, uint32_t) {
  return available_memory_bytes();
}

// The best first: "auto" takes the first that has a device.
const std::vector<BackendKind>& backends() {
  static const std::vector<BackendKind> kinds = {
#ifdef NIBBLE_HAS_CUDA
      {"cuda",
       cuda::device_count,
       cuda::free_bytes_for,
       cuda::make_cuda_backend,
       {backend::WeightStorage::kPacked, backend::WeightStorage::kDirect},
       "; layers can't be shared between GPU and CPU: --backend cpu has the processor's memory"},
#endif
      {"cpu", one_device, free_host_bytes, make_on_host<cpu::make_cpu_backend>},
      {"reference", one_device, free_host_bytes, make_on_host<reference::make_reference_backend>},
  };
  return kinds;
}

const BackendKind& find_backend(std::string_view name) {
  std::string names = "auto";
  for (const BackendKind& kind : backends()) {
    const bool chosen = name == "auto" ? kind.devices() > 0 : kind.name == name;
    if (chosen && kind.devices() == 0) {
      fail(ErrorCode::kUnsupported, "backend '{}' finds no device on this machine", name);
    }
    if (chosen) return kind;
    names += fmt::format(", {}", kind.name);
  }
  if (name == "cuda" || name == "metal") {
    fail(ErrorCode::kUnsupported, "this build has no backend '{}'; it has: {}", name, names);
  }
  fail(ErrorCode::kInvalidArgument, "there is no backend '{}'; this build has: {}", name, names);
}

// What is known of a backend whether this build has it or not.
struct BackendTraits {
  std::string_view name;
  uint32_t ubatch;                            // where none is asked for
  std::vector<backend::KvFormat> kv_formats;  // the first one where none is asked for
  uint64_t driver_bytes = 0;                  // MemoryNeeds'
};

// nullptr: no backend's name.
const BackendTraits* find_traits(std::string_view backend) {
  using enum backend::KvFormat;
  static const BackendTraits traits[] = {
      // 0.34 to 0.35 GB were measured: docs/measurements/memory.md. The step: prefill.md.
      {"cuda", 1024, {kF16, kQ8, kTq4}, 350'000'000},
      {"cpu", 512, {kF16, kQ8, kTq4, kF32}},
      {"reference", 512, {kF32, kF16, kQ8, kTq4}},
  };
  if (backend == "auto") backend = find_backend("auto").name;
  const auto* found = std::ranges::find(traits, backend, &BackendTraits::name);
  return found == std::end(traits) ? nullptr : found;
}

// Throws as open() does on names that are no backend's.
const BackendTraits& require_traits(std::string_view backend) {
  const BackendTraits* traits = find_traits(backend);
  if (traits == nullptr) find_backend(backend);
  NIBBLE_CHECK(traits != nullptr);
  return *traits;
}

void validate(const EngineOptions& options, const BackendKind& kind) {
  if (options.sessions == 0 || options.sessions > kMaxSessions) {
    fail(ErrorCode::kInvalidArgument, "{} sessions asked for, expected 1 to {}", options.sessions,
         kMaxSessions);
  }
  if (options.ubatch > kMaxUbatch) {
    fail(ErrorCode::kInvalidArgument, "ubatch is {}, expected 1 to {}, or 0 for {}", options.ubatch,
         kMaxUbatch, default_ubatch(kind.name));
  }
  if (options.device >= kind.devices()) {
    fail(ErrorCode::kInvalidArgument, "device {} asked for, but backend '{}' has {}, from 0 on",
         options.device, kind.name, kind.devices());
  }
  for (const auto& format : {options.kv_format, options.kv_window_format}) {
    if (format && std::ranges::count(kv_formats(kind.name), *format) == 0) {
      fail(ErrorCode::kUnsupported, "backend '{}' has no {} KV", kind.name, to_string(*format));
    }
  }
  if (options.weights && std::ranges::count(kind.weights, *options.weights) == 0) {
    fail(ErrorCode::kUnsupported, "backend '{}' has no {} weights, only {} ones", kind.name,
         to_string(*options.weights), to_string(kind.weights.front()));
  }
}

}  // namespace

uint32_t default_ubatch(std::string_view backend) {
  return require_traits(backend).ubatch;
}

std::span<const backend::KvFormat> kv_formats(std::string_view backend) {
  const BackendTraits* traits = find_traits(backend);
  return traits ? traits->kv_formats : std::span<const backend::KvFormat>();
}

backend::KvOptions kv_options(const backend::Plan& plan, const EngineOptions& options) {
  using enum backend::KvFormat;
  backend::KvFormat format = require_traits(options.backend).kv_formats.front();
  if (format == kF16 && options.context > kLongContext && allows(plan, kQ8)) format = kQ8;
  if (options.kv_format) format = *options.kv_format;
  return {.format = format,
          .window_format = options.kv_window_format.value_or(format == kF32 ? kF32 : kF16),
          .layout = options.kv_layout};
}

std::vector<backend::KvOptions> kv_choices(const backend::Plan& plan, EngineOptions options) {
  std::vector<backend::KvOptions> choices;
  for (const backend::KvFormat format : kv_formats(options.backend)) {
    if (!allows(plan, format)) continue;
    options.kv_format = format;
    choices.push_back(kv_options(plan, options));
  }
  return choices;
}

namespace {

SizeRequest size_request(const backend::Plan& plan, const EngineOptions& options) {
  return {.kv = kv_options(plan, options),
          .alternatives = kv_choices(plan, options),
          .context = options.context,
          .sessions = options.sessions,
          .ubatch = options.ubatch == 0 ? default_ubatch(options.backend) : options.ubatch,
          .snapshots = options.snapshots};
}

}  // namespace

MemoryNeeds memory_needs(const backend::Plan& plan, const EngineOptions& options) {
  SizeRequest request = size_request(plan, options);
  if (request.context == 0) request.context = plan.trained_context;
  MemoryNeeds needs = needs_of(plan, request);
  needs.driver_bytes = require_traits(options.backend).driver_bytes;
  return needs;
}

struct Engine::Parts {
  explicit Parts(ModelFile opened)
      : file(std::move(opened)),
        plan(file.build_plan()),
        tokenizer(text::Tokenizer::from_gguf(file.gguf())),
        sampling(sampling_defaults(file.gguf())) {
    if (tokenizer) chat = text::ChatFormat::from_gguf(file.gguf(), *tokenizer);
    if (tokenizer && tokenizer->vocabulary() != plan.vocabulary) {
      fail(ErrorCode::kMalformedFile,
           "the tokenizer has {} tokens, but the model's embedding has {} rows",
           tokenizer->vocabulary(), plan.vocabulary);
    }
  }

  ModelFile file;
  backend::Plan plan;
  std::unique_ptr<const text::Tokenizer> tokenizer;
  std::unique_ptr<const text::ChatFormat> chat;
  backend::SamplingParams sampling;
  std::unique_ptr<backend::Backend> backend;
  std::optional<Scheduler> scheduler;
};

std::unique_ptr<Engine> Engine::open(const std::filesystem::path& path,
                                     const EngineOptions& options, const Progress& progress) {
  const BackendKind& kind = find_backend(options.backend);
  validate(options, kind);
  ModelFile file = ModelFile::open(path);
  if (const PackedModel* packed = file.packed(); packed && packed->backend() != kind.name) {
    fail(ErrorCode::kUnsupported,
         "{} is packed for backend '{}', but would run on '{}' here; open the GGUF file that it "
         "was packed from, {}",
         path.string(), packed->backend(), kind.name, packed->source_name());
  }
  const backend::WeightStorage weights = options.weights.value_or(kind.weights.front());
  if (file.packed() && weights == backend::WeightStorage::kDirect) {
    fail(ErrorCode::kUnsupported,
         "{} is packed, but direct weights are those of a GGUF file; open {}, its source",
         path.string(), file.packed()->source_name());
  }
  auto parts = std::make_unique<Parts>(std::move(file));
  SizeRequest request = size_request(parts->plan, options);
  request.advice = kind.memory_advice;
  Size size = fit(parts->plan, request, kind.free_bytes(parts->plan, weights, options.device));
  parts->backend = kind.make(parts->plan,
                             {.kv = request.kv,
                              .weights = weights,
                              .ubatch = request.ubatch,
                              .threads = options.threads,
                              .device = options.device,
                              .max_kv_pages = std::move(size.max_kv_pages)},
                             progress);
  parts->scheduler.emplace(*parts->backend, Scheduler::Limits{.vocabulary = parts->plan.vocabulary,
                                                              .context = size.context,
                                                              .ubatch = request.ubatch,
                                                              .snapshots = size.snapshots});
  return std::unique_ptr<Engine>(new Engine(std::move(parts)));
}

Engine::Engine(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Engine::~Engine() = default;

const gguf::GgufFile& Engine::file() const {
  return parts_->file.gguf();
}
const backend::Plan& Engine::plan() const {
  return parts_->plan;
}
const text::Tokenizer* Engine::tokenizer() const {
  return parts_->tokenizer.get();
}
const text::ChatFormat* Engine::chat_format() const {
  return parts_->chat.get();
}
backend::Backend& Engine::backend() {
  return *parts_->backend;
}
uint32_t Engine::context() const {
  return parts_->scheduler->limits().context;
}
uint32_t Engine::ubatch() const {
  return parts_->scheduler->limits().ubatch;
}
const backend::SamplingParams& Engine::default_sampling() const {
  return parts_->sampling;
}
std::unique_ptr<Session> Engine::new_session() {
  return parts_->scheduler->new_session();
}
bool Engine::step(std::span<Session* const> sessions) {
  return parts_->scheduler->step(sessions);
}

}  // namespace nibble::engine
