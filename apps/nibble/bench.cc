// nibble bench: speed at given contexts, against the speed of memory.

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <random>

#include "base/error.h"
#include "base/memory.h"
#include "engine/packed_model.h"
#include "nibble/commands.h"
#include "nibble/input.h"
#include "nibble/json.h"
#include "nibble/model_options.h"
#include "nibble/read_bandwidth.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

struct BenchOptions {
  ModelOptions model;
  std::string contexts = "512,2048";
  std::string batches = "1";
  uint32_t capacity = 0;
  uint32_t generate = 64;
  bool profile = false;
  std::string json;
};

// Speeds of `batch` conversations side by side; tokens of all of them are counted.
struct Point {
  uint32_t batch;
  uint32_t context;
  double prefill_tokens_per_s;
  double decode_tokens_per_s;
  double decode_ms;        // one step: one token of each conversation
  double bytes_per_token;  // weights and cache that must be read
  double bytes_per_s() const { return bytes_per_token * decode_tokens_per_s; }
};

// Bytes of weights that one step of the plan reads whatever the batch: whole matrices, but of the
// embedding table only the rows that are looked up.
struct WeightBytes {
  const backend::Plan& plan;
  uint64_t operator()(const backend::EmbedStep&) const { return 0; }
  uint64_t operator()(const backend::NormQkvStep& step) const { return of(step.qkv); }
  uint64_t operator()(const backend::AttendStep&) const { return 0; }
  uint64_t operator()(const backend::ProjectStep& step) const { return of(step.weight); }
  uint64_t operator()(const backend::GatedMlpStep& step) const {
    return of(step.gate_up) + of(step.down);
  }
  uint64_t operator()(const backend::LogitsStep& step) const { return of(step.weight); }
  uint64_t of(backend::WeightId id) const { return plan.weight(id).bytes(); }
};

uint64_t weight_bytes_per_step(const backend::Plan& plan) {
  uint64_t bytes = 0;
  for (const backend::Step& step : plan.steps) bytes += std::visit(WeightBytes{plan}, step);
  return bytes;
}

// Bytes of keys and values that one token at `context` attends to.
uint64_t kv_bytes_per_token(const std::vector<backend::KvGroup>& groups, uint32_t context) {
  uint64_t bytes = 0;
  for (const backend::KvGroup& group : groups) {
    const uint32_t seen = group.window == 0 ? context : std::min(context, group.window);
    bytes += group.page_bytes / backend::kKvPageTokens * seen;
  }
  return bytes;
}

constexpr uint32_t kWarmUp = 1;  // a backend may have to get ready for a shape of step
constexpr uint32_t kProfiledSteps = 8;

struct Profile {
  std::string_view step;
  uint32_t steps;
  std::vector<backend::ProfileEntry> entries;  // of all these steps
};

class Bench {
 public:
  Bench(engine::Engine& engine, uint32_t generate)
      : engine_(engine), generate_(generate), weight_bytes_(weight_bytes_per_step(engine.plan())) {}

  // Fills `batch` conversations up to each context in turn and decodes the last tokens before it.
  // contexts: ascending
  void run(uint32_t batch, std::span<const uint32_t> contexts) {
    sessions_.clear();
    for (uint32_t i = 0; i < batch; ++i) sessions_.push_back(engine_.new_session());
    uint32_t length = 0;
    for (const uint32_t context : contexts) {
      bar_.update("bench", points_.size(), points_.size() + contexts.size());
      const uint32_t fill = context - kWarmUp - generate_ - length;
      const double prefill_ms = prefill(fill);
      decode(kWarmUp);
      const double decode_ms = decode(generate_);
      length = context;
      peak_kv_bytes_ = std::max(peak_kv_bytes_, engine_.backend().memory().kv_bytes);
      const uint64_t kv_bytes = kv_bytes_per_token(engine_.backend().kv().groups(), context);
      points_.push_back({.batch = batch,
                         .context = context,
                         .prefill_tokens_per_s = 1e3 * fill * batch / prefill_ms,
                         .decode_tokens_per_s = 1e3 * generate_ * batch / decode_ms,
                         .decode_ms = decode_ms / generate_,
                         .bytes_per_token = double(weight_bytes_) / batch + double(kv_bytes)});
    }
  }

  // Where the time goes of decode steps at the last point and of the prefill step behind it.
  std::vector<Profile> profile() {
    return {profile("decode", kProfiledSteps, [&] { decode(kProfiledSteps); }),
            profile("prefill", 1,
                    [&] { prefill(std::max(1u, engine_.ubatch() / uint32_t(sessions_.size()))); })};
  }

  const std::vector<Point>& points() const { return points_; }
  uint64_t peak_kv_bytes() const { return peak_kv_bytes_; }

 private:
  template <class Run>
  Profile profile(std::string_view step, uint32_t steps, const Run& run) {
    backend::Backend& backend = engine_.backend();
    backend.set_profiling(true);
    run();
    backend.set_profiling(false);
    return {step, steps, backend.profile()};
  }

  double prefill(uint32_t tokens) {
    std::uniform_int_distribution<int32_t> any(0, int32_t(engine_.plan().vocabulary) - 1);
    std::vector<TokenId> ids(tokens);
    for (const auto& session : sessions_) {
      for (TokenId& id : ids) id = {any(random_)};
      session->feed(ids);
    }
    return run_steps();
  }

  double decode(uint32_t steps) {
    double ms = 0;
    for (uint32_t i = 0; i < steps; ++i) {
      for (const auto& session : sessions_) {
        const TokenId token = session->next_token();
        session->feed({&token, 1});
      }
      ms += run_steps();
    }
    return ms;
  }

  double run_steps() {
    std::vector<engine::Session*> sessions;
    for (const auto& session : sessions_) sessions.push_back(session.get());
    const Stopwatch watch;
    while (engine_.step(sessions)) {
    }
    const double ms = watch.ms();
    for (const auto& session : sessions_) {
      if (session->error()) throw *session->error();
    }
    return ms;
  }

  engine::Engine& engine_;
  const uint32_t generate_;
  const uint64_t weight_bytes_;
  std::mt19937_64 random_{1};  // the same tokens in each run
  std::vector<std::unique_ptr<engine::Session>> sessions_;
  std::vector<Point> points_;
  uint64_t peak_kv_bytes_ = 0;
  ProgressBar bar_;
};

struct Report {
  std::string kv;  // as it is stored: `auto` depends on the context
  std::vector<Point> points;
  backend::MemoryUse memory;
  uint64_t peak_kv_bytes;
  uint64_t peak_bytes;
  double read_bytes_per_s;
  double matrix_flops_per_s = 0;  // of the device's matrix units, where it was measured
  std::vector<Profile> profiles;
};

boost::json::object to_json(const Report& report, const BenchOptions& options,
                            const OpenModel& model) {
  engine::Engine& engine = *model.engine;
  const backend::Plan& plan = engine.plan();
  boost::json::array points;
  for (const Point& point : report.points) {
    points.push_back({{"batch", point.batch},
                      {"context", point.context},
                      {"prefill_tokens_per_s", point.prefill_tokens_per_s},
                      {"decode_tokens_per_s", point.decode_tokens_per_s},
                      {"decode_ms", point.decode_ms},
                      {"bytes_per_token", point.bytes_per_token},
                      {"bandwidth_fraction", point.bytes_per_s() / report.read_bytes_per_s}});
  }
  boost::json::object profiles;
  for (const Profile& profile : report.profiles) {
    boost::json::array entries;
    for (const backend::ProfileEntry& entry : profile.entries) {
      entries.push_back({{"kind", entry.kind},
                         {"calls_per_step", double(entry.calls) / profile.steps},
                         {"us_per_step", entry.us / profile.steps},
                         {"bytes_per_step", double(entry.bytes) / profile.steps},
                         {"flops_per_step", entry.flops / profile.steps}});
    }
    profiles[profile.step] = std::move(entries);
  }
  return {{"device", engine.backend().description()},
          {"commit", NIBBLE_COMMIT},
          {"model",
           {{"file", printable(model_path(options.model.model).filename().string())},
            {"bytes", engine.file().file_bytes()},
            {"architecture", plan.architecture},
            {"weight_bytes_per_step", weight_bytes_per_step(plan)}}},
          {"config",
           {{"kv", report.kv},
            {"context", engine.context()},
            {"ubatch", engine.ubatch()},
            {"generate", options.generate}}},
          {"read_bytes_per_s", report.read_bytes_per_s},
          {"matrix_flops_per_s", report.matrix_flops_per_s},
          {"points", std::move(points)},
          {"profile", std::move(profiles)},
          {"memory",
           {{"weights_bytes", report.memory.weights_bytes},
            {"kv_bytes", report.peak_kv_bytes},
            {"workspace_bytes", report.memory.workspace_bytes},
            {"peak_bytes", report.peak_bytes}}},
          {"load_ms", model.load_ms}};
}

void print(const Report& report) {
  fmt::print("memory reads at {:.1f} GB/s with nothing else to do\n\n",
             report.read_bytes_per_s / 1e9);
  fmt::print("{:>5}  {:>7}  {:>13}  {:>12}  {:>7}  {:>8}  {:>5}  {}\n", "batch", "context",
             "prefill tok/s", "decode tok/s", "ms/step", "MB/token", "GB/s", "of memory speed");
  for (const Point& point : report.points) {
    fmt::print("{:>5}  {:>7}  {:>13.1f}  {:>12.1f}  {:>7.2f}  {:>8.1f}  {:>5.1f}  {:>13.0f} %\n",
               point.batch, point.context, point.prefill_tokens_per_s, point.decode_tokens_per_s,
               point.decode_ms, point.bytes_per_token / 1e6, point.bytes_per_s() / 1e9,
               100 * point.bytes_per_s() / report.read_bytes_per_s);
  }
  fmt::print("\nweights {}, cache {} ({}), workspace {}; most memory ever resident {}\n",
             human_bytes(report.memory.weights_bytes), human_bytes(report.peak_kv_bytes), report.kv,
             human_bytes(report.memory.workspace_bytes), human_bytes(report.peak_bytes));
}

// `value` and its share of `peak`, in a column of its own each; blank where there is none.
std::string with_share(double value, double peak, int digits) {
  if (value == 0) return fmt::format("  {:>8}  {:>7}", "", "");
  const std::string share = peak == 0 ? "" : fmt::format("{:.1f} %", 100 * value / peak);
  return fmt::format("  {:>8.{}f}  {:>7}", value, digits, share);
}

// Each kind's time alone, which hides what overlaps in a real step: look at the shares.
void print(const Profile& profile, const Report& report) {
  double total_us = 0;
  for (const backend::ProfileEntry& entry : profile.entries) total_us += entry.us;
  if (profile.entries.empty()) {
    fmt::print("\n{} step: this backend has no profile\n", profile.step);
    return;
  }
  fmt::print("\n{:<20} {:>10}  {:>9}  {:>7}  {:>7}  {:>8}  {:>7}  {:>8}  {:>7}\n",
             fmt::format("{} step", profile.step), "calls/step", "us/step", "share", "us/call",
             "TFLOP/s", "of peak", "GB/s", "of peak");
  for (const backend::ProfileEntry& entry : profile.entries) {
    std::string line = fmt::format(
        "{:<20} {:>10.1f}  {:>9.1f}  {:>5.1f} %  {:>7.2f}{}{}", entry.kind,
        double(entry.calls) / profile.steps, entry.us / profile.steps, 100 * entry.us / total_us,
        entry.us / double(entry.calls),
        with_share(entry.flops / entry.us / 1e6, report.matrix_flops_per_s / 1e12, 1),
        with_share(double(entry.bytes) / entry.us / 1e3, report.read_bytes_per_s / 1e9, 0));
    line.resize(line.find_last_not_of(' ') + 1);
    fmt::print("{}\n", line);
  }
  fmt::print("{:<20} {:>10}  {:>9.1f}\n", "sum", "", total_us / profile.steps);
}

void bench(const BenchOptions& options) {
  std::vector<uint32_t> contexts = parse_counts("--context", options.contexts);
  const std::vector<uint32_t> batches = parse_counts("--batch", options.batches);
  std::sort(contexts.begin(), contexts.end());
  uint32_t reached = 0;
  for (const uint32_t context : contexts) {
    if (context <= reached + uint64_t{options.generate} + kWarmUp) {
      throw CLI::ValidationError(
          "--context", fmt::format("{} tokens leave nothing to prefill from {} on before {} are "
                                   "generated; take a smaller --generate",
                                   context, reached, options.generate + kWarmUp));
    }
    reached = context;
  }

  engine::EngineOptions engine_options = options.model.engine_options();
  engine_options.context = std::max(contexts.back(), options.capacity);
  if (options.profile) {
    // Its steps come behind the last context and must not change what --kv auto takes there.
    const auto plan = engine::ModelFile::open(model_path(options.model.model)).build_plan();
    engine_options.kv_format = kv_options(plan, engine_options).format;
    const uint32_t ubatch = engine_options.ubatch;
    engine_options.context =
        std::max(engine_options.context,
                 contexts.back() + kProfiledSteps +
                     (ubatch == 0 ? engine::default_ubatch(engine_options.backend) : ubatch));
  }
  engine_options.sessions = *std::max_element(batches.begin(), batches.end());
  const OpenModel model = open_model(options.model, engine_options);

  Report report;
  report.kv = describe_kv(model.engine->backend().kv().groups());
  {
    Bench bench(*model.engine, options.generate);
    for (const uint32_t batch : batches) bench.run(batch, contexts);
    report.points = bench.points();
    report.peak_kv_bytes = bench.peak_kv_bytes();
    if (options.profile) report.profiles = bench.profile();
  }
  report.memory = model.engine->backend().memory();
  report.peak_bytes = peak_resident_bytes();  // before the read loop takes memory of its own
  report.read_bytes_per_s = model.engine->backend().read_bandwidth();
  if (report.read_bytes_per_s == 0) {
    report.read_bytes_per_s = measure_read_bandwidth(options.model.threads);
  }
  if (options.profile) report.matrix_flops_per_s = model.engine->backend().matrix_rate();
  print(report);
  if (report.matrix_flops_per_s != 0) {
    fmt::print("matrices are multiplied at {:.0f} TFLOP/s with nothing else to do\n",
               report.matrix_flops_per_s / 1e12);
  }
  for (const Profile& profile : report.profiles) print(profile, report);

  if (!options.json.empty()) {
    std::ofstream out(options.json);
    out << to_text(to_json(report, options, model)) << '\n';
    out.close();
    if (!out) fail(ErrorCode::kIo, "{}: can't write: {}", options.json, strerror(errno));
  }
}

}  // namespace

void add_bench(CLI::App& app) {
  auto options = std::make_shared<BenchOptions>();
  CLI::App* command = app.add_subcommand("bench", "Measure speed, against the speed of memory");
  options->model.add_to(*command);
  command
      ->add_option("-c,--context", options->contexts,
                   "Contexts to measure at, separated by commas; left out: 512,2048")
      ->type_name("TOKENS,...");
  command
      ->add_option("--capacity", options->capacity,
                   "Context that conversations could grow to; left out: the largest measured")
      ->check(finite_between(1, UINT32_MAX))
      ->type_name("TOKENS");
  command
      ->add_option("--generate", options->generate,
                   "Tokens to decode, the last ones before each context; left out: 64")
      ->check(finite_between(1, INT32_MAX))
      ->type_name("N");
  command
      ->add_option("--batch", options->batches,
                   "Conversations side by side, separated by commas; left out: 1")
      ->type_name("N,...");
  command->add_flag("--profile", options->profile,
                    "Time each kind of work of a decode and of a prefill step by itself, where the "
                    "backend can");
  command->add_option("--json", options->json, "Write the results as JSON, too")->type_name("FILE");
  command->footer(
      "The tokens are random with a fixed seed; text plays no role. Prefill is measured from one\n"
      "context to the next. The share of memory speed is what decoding must read (weights, keys\n"
      "and values) per second, by what a plain loop reads in the same run.\n"
      "Examples:\n"
      "  nibble bench model.gguf\n"
      "  nibble bench model.gguf --context 512,8192 --generate 32 --batch 1,8 --json result.json");
  command->callback([options] { bench(*options); });
}

}  // namespace nibble::app
