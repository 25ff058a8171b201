#include "engine/engine.h"

#include <limits>
#include <set>
#include <utility>

#include "base/memory.h"
#include "cpu/cpu_backend.h"
#include "engine/memory.h"
#include "engine/sampling_defaults.h"
#include "engine/scheduler.h"
#include "model/model.h"
#include "reference/reference_backend.h"

namespace nibble::engine {
namespace {

constexpr uint32_t kDefaultUbatch = 512;
constexpr uint32_t kMaxUbatch = 65536;
constexpr uint32_t kMaxSessions = 65536;

// A backend that this build has.
struct BackendKind {
  std::string_view name;
  backend::KvFormat kv_format;  // where none is asked for
  std::unique_ptr<backend::Backend> (*make)(const backend::Plan&, const backend::BackendOptions&);
};
constexpr BackendKind kBackends[] = {
    {"cpu", backend::KvFormat::kF16, cpu::make_cpu_backend},
    {"reference", backend::KvFormat::kF32, reference::make_reference_backend},
};

const BackendKind& find_backend(std::string_view name) {
  if (name == "auto") return kBackends[0];
  std::string names = "auto";
  for (const BackendKind& kind : kBackends) {
    if (kind.name == name) return kind;
    names += fmt::format(", {}", kind.name);
  }
  if (name == "cuda" || name == "metal") {
    fail(ErrorCode::kUnsupported, "this build has no backend '{}'; it has: {}", name, names);
  }
  fail(ErrorCode::kInvalidArgument, "there is no backend '{}'; this build has: {}", name, names);
}

void validate(const EngineOptions& options, const BackendKind& kind) {
  if (options.sessions == 0 || options.sessions > kMaxSessions) {
    fail(ErrorCode::kInvalidArgument, "{} sessions asked for, expected 1 to {}", options.sessions,
         kMaxSessions);
  }
  if (options.ubatch > kMaxUbatch) {
    fail(ErrorCode::kInvalidArgument, "ubatch is {}, expected 1 to {}, or 0 for {}", options.ubatch,
         kMaxUbatch, kDefaultUbatch);
  }
  if (options.device != 0) {
    fail(ErrorCode::kInvalidArgument, "device {} asked for, but backend '{}' has only device 0",
         options.device, kind.name);
  }
}

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

}  // namespace

struct Engine::Parts {
  explicit Parts(gguf::GgufFile opened)
      : file(std::move(opened)),
        plan(model::build_plan(file)),
        tokenizer(text::Tokenizer::from_gguf(file)),
        sampling(sampling_defaults(file)) {
    if (tokenizer) chat = text::ChatFormat::from_gguf(file, *tokenizer);
    if (tokenizer && tokenizer->vocabulary() != plan.vocabulary) {
      fail(ErrorCode::kMalformedFile,
           "the tokenizer has {} tokens, but the model's embedding has {} rows",
           tokenizer->vocabulary(), plan.vocabulary);
    }
  }

  gguf::GgufFile file;
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
  auto parts = std::make_unique<Parts>(gguf::GgufFile::open(path));
  const SizeRequest request{.format = options.kv_format.value_or(kind.kv_format),
                            .context = options.context,
                            .sessions = options.sessions,
                            .ubatch = options.ubatch == 0 ? kDefaultUbatch : options.ubatch};
  Size size = fit(parts->plan, request, available_memory_bytes());
  page_in(parts->plan, progress);
  parts->backend = kind.make(parts->plan, {.kv_format = request.format,
                                           .ubatch = request.ubatch,
                                           .threads = options.threads,
                                           .device = options.device,
                                           .max_kv_pages = std::move(size.max_kv_pages)});
  parts->scheduler.emplace(*parts->backend, Scheduler::Limits{.vocabulary = parts->plan.vocabulary,
                                                              .context = size.context,
                                                              .ubatch = request.ubatch});
  return std::unique_ptr<Engine>(new Engine(std::move(parts)));
}

Engine::Engine(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}
Engine::~Engine() = default;

const gguf::GgufFile& Engine::file() const {
  return parts_->file;
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
