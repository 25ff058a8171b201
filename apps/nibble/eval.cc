// nibble eval: how well a model predicts a text, and how far one set-up is from another.

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/error.h"
#include "base/mapped_file.h"
#include "base/thread_pool.h"
#include "nibble/commands.h"
#include "nibble/json.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

struct EvalOptions {
  ModelOptions model;
  std::string tokens_file;
  uint32_t window = 512;
  std::optional<uint32_t> limit;
  std::string against, against_backend, against_kv = "auto";
  bool json = false;

  bool compares() const {
    return !against.empty() || !against_backend.empty() || against_kv != "auto";
  }
};

// What one position says; kl and agrees only where there is something to compare with.
struct Position {
  double nll = 0;
  double kl = 0;
  bool agrees = false;
};

struct Result {
  double nll = 0;
  size_t predictions = 0;
  bool compared = false;
  double kl_mean = 0, kl_p99 = 0, kl_max = 0;
  double top1_agreement = 0;
};

std::vector<TokenId> read_tokens(const std::string& path, uint32_t vocabulary) {
  static_assert(std::endian::native == std::endian::little, "token files are little-endian");
  const MappedFile file = MappedFile::open(path);
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() % sizeof(TokenId) != 0) {
    fail(ErrorCode::kMalformedFile, "{}: {} bytes are no whole number of 4-byte token ids", path,
         bytes.size());
  }
  std::vector<TokenId> tokens(bytes.size() / sizeof(TokenId));
  std::copy(bytes.begin(), bytes.end(), reinterpret_cast<std::byte*>(tokens.data()));
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i].value < 0 || uint32_t(tokens[i].value) >= vocabulary) {
      fail(ErrorCode::kMalformedFile,
           "{}: token {} is {}, but the model's vocabulary has {} tokens; is the file made with "
           "this model's tokenizer?",
           path, i, tokens[i].value, vocabulary);
    }
  }
  return tokens;
}

// log of the sum of e^logit, in double.
double log_sum_exp(std::span<const float> logits) {
  const float top = *std::max_element(logits.begin(), logits.end());
  double sum = 0;
  for (const float logit : logits) sum += std::exp(double(logit) - top);
  return top + std::log(sum);
}

size_t argmax(std::span<const float> logits) {
  return size_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// KL(P || Q) in nats, P from the set-up that is compared against.
double divergence(std::span<const float> p_logits, std::span<const float> q_logits) {
  const double p_norm = log_sum_exp(p_logits), q_norm = log_sum_exp(q_logits);
  double sum = 0;
  for (size_t i = 0; i < p_logits.size(); ++i) {
    const double log_p = p_logits[i] - p_norm;
    sum += std::exp(log_p) * (log_p - (q_logits[i] - q_norm));
  }
  return sum;
}

// `against` is empty when there is nothing to compare with.
Position assess(std::span<const float> logits, std::span<const float> against, TokenId target) {
  Position position;
  position.nll = log_sum_exp(logits) - logits[size_t(target.value)];
  if (!against.empty()) {
    position.kl = divergence(against, logits);
    position.agrees = argmax(against) == argmax(logits);
  }
  return position;
}

Result summarize(const std::vector<Position>& positions, bool compared) {
  Result result;
  result.predictions = positions.size();
  result.compared = compared;
  const double count = double(positions.size());
  std::vector<double> divergences;
  size_t agreed = 0;
  for (const Position& position : positions) {
    result.nll += position.nll / count;
    result.kl_mean += position.kl / count;
    agreed += position.agrees;
    divergences.push_back(position.kl);
  }
  std::sort(divergences.begin(), divergences.end());
  result.kl_p99 = divergences[size_t(std::ceil(0.99 * count)) - 1];
  result.kl_max = divergences.back();
  result.top1_agreement = double(agreed) / count;
  return result;
}

class Evaluation {
 public:
  // `against` may be null.
  Evaluation(engine::Engine& model, engine::Engine* against, std::span<const TokenId> tokens,
             uint32_t window)
      : model_(model), against_(against), tokens_(tokens), window_(window) {}

  Result run(size_t windows) {
    ProgressBar bar;
    for (size_t i = 0; i < windows; ++i) {
      bar.update("eval", i, windows);
      add_window(i * window_);
    }
    return summarize(positions_, against_ != nullptr);
  }

 private:
  void add_window(size_t start) {
    const std::unique_ptr<engine::Session> session = model_.new_session();
    const std::unique_ptr<engine::Session> other = against_ ? against_->new_session() : nullptr;
    uint32_t most_rows = logit_rows_at_once(model_);
    if (against_) most_rows = std::min(most_rows, against_->ubatch());
    for (size_t done = 0; done < window_;) {
      const uint32_t rows =
          uint32_t(std::min<size_t>({window_ - done, most_rows, model_.ubatch()}));
      const std::span<const TokenId> chunk = tokens_.subspan(start + done, rows);
      session->extend(chunk, rows);
      if (other) other->extend(chunk, rows);
      add_rows(session->logits(), other ? other->logits() : std::span<const float>(),
               tokens_.subspan(start + done + 1, rows));
      done += rows;
    }
  }

  // logits, against: [targets, vocabulary]; against may be empty
  void add_rows(std::span<const float> logits, std::span<const float> against,
                std::span<const TokenId> targets) {
    const size_t vocabulary = model_.plan().vocabulary;
    const size_t first = positions_.size();
    positions_.resize(first + targets.size());
    pool_.for_each_chunk(targets.size(), 1, [&](size_t begin, size_t end, uint32_t) {
      for (size_t i = begin; i < end; ++i) {
        const auto row = [&](std::span<const float> rows) {
          return rows.empty() ? rows : rows.subspan(i * vocabulary, vocabulary);
        };
        positions_[first + i] = assess(row(logits), row(against), targets[i]);
      }
    });
  }

  engine::Engine& model_;
  engine::Engine* const against_;
  const std::span<const TokenId> tokens_;
  const size_t window_;
  std::vector<Position> positions_;
  ThreadPool pool_;
};

std::unique_ptr<engine::Engine> open_against(const EvalOptions& options,
                                             const engine::EngineOptions& base) {
  ModelOptions model = options.model;
  if (!options.against.empty()) model.model = options.against;
  engine::EngineOptions engine_options = base;
  if (!options.against_backend.empty() && options.against_backend != base.backend) {
    engine_options.backend = options.against_backend;
    engine_options.weights.reset();  // --weights and --device are those of --backend
    engine_options.device = 0;
  }
  // The reference is exact in all it can be: --kv chooses what is measured, not what against.
  auto format = backend::kv_format_of(options.against_kv);
  if (options.against_backend == "reference" && !format) format = backend::KvFormat::kF32;
  if (format) {
    engine_options.kv_format = format;
    engine_options.kv_window_format.reset();
  }
  return open_model(model, engine_options).engine;
}

void print(const Result& result, bool json) {
  const double perplexity = std::exp(result.nll);
  if (json) {
    boost::json::object object{
        {"nll", result.nll}, {"ppl", perplexity}, {"predictions", result.predictions}};
    if (result.compared) {
      object["kl"] = {{"mean", result.kl_mean}, {"p99", result.kl_p99}, {"max", result.kl_max}};
      object["top1_agreement"] = result.top1_agreement;
    }
    fmt::print("{}\n", to_text(object));
    return;
  }
  fmt::print("mean NLL         {:.6f} nats over {} predictions\n", result.nll, result.predictions);
  fmt::print("perplexity       {:.4f}\n", perplexity);
  if (!result.compared) return;
  fmt::print("KL divergence    mean {:.3g}, 99th percentile {:.3g}, largest {:.3g} nats\n",
             result.kl_mean, result.kl_p99, result.kl_max);
  fmt::print("top-1 agreement  {:.2f} %\n", 100 * result.top1_agreement);
}

void eval(const EvalOptions& options) {
  engine::EngineOptions engine_options = options.model.engine_options();
  prefer_exact_kv(engine_options);
  if (engine_options.context == 0) engine_options.context = options.window;
  const OpenModel model = open_model(options.model, engine_options);
  const uint32_t vocabulary = model.engine->plan().vocabulary;

  const std::vector<TokenId> tokens = read_tokens(options.tokens_file, vocabulary);
  // Each window needs one token more than it has positions: the last one's target.
  size_t windows = tokens.empty() ? 0 : (tokens.size() - 1) / options.window;
  if (windows == 0) {
    fail(ErrorCode::kInvalidArgument,
         "{}: {} tokens, but one window needs --window + 1 = {} of them", options.tokens_file,
         tokens.size(), uint64_t{options.window} + 1);
  }
  if (options.limit) windows = std::min<size_t>(windows, *options.limit);

  std::unique_ptr<engine::Engine> against;
  if (options.compares()) {
    against = open_against(options, engine_options);
    if (against->plan().vocabulary != vocabulary) {
      fail(ErrorCode::kInvalidArgument,
           "the models' vocabularies differ ({} and {} tokens), so their predictions can't be "
           "compared",
           vocabulary, against->plan().vocabulary);
    }
  }
  print(Evaluation(*model.engine, against.get(), tokens, options.window).run(windows),
        options.json);
}

}  // namespace

void add_eval(CLI::App& app) {
  auto options = std::make_shared<EvalOptions>();
  CLI::App* command = app.add_subcommand("eval", "Measure how well a model predicts a text");
  options->model.add_to(*command);
  options->model.add_context_to(*command);
  command->add_option("--tokens", options->tokens_file, "The text: token ids as raw int32")
      ->required()
      ->type_name("FILE");
  command
      ->add_option("--window", options->window,
                   "Tokens that are read from scratch at a time; left out: 512")
      ->check(finite_between(1, INT32_MAX - 1))
      ->type_name("TOKENS");
  command->add_option("--limit", options->limit, "Only the first so many windows")
      ->check(finite_between(1, INT32_MAX))
      ->type_name("N");
  command->add_option("--against", options->against, "Compare with another model file")
      ->type_name("MODEL");
  command->add_option("--against-backend", options->against_backend, "Compare with another backend")
      ->check(CLI::IsMember({"auto", "cpu", "cuda", "metal", "reference"}).description(""))
      ->type_name("NAME");
  command
      ->add_option("--against-kv", options->against_kv,
                   "Compare with another KV cache: --kv of it, without --kv-window")
      ->check(is_kv_format())
      ->type_name("FORMAT");
  command->add_flag("--json", options->json, "Print JSON");
  command->footer(
      "Tokens [Wi, Wi+W) of window i predict tokens [Wi+1, Wi+W+1); nothing is added. NLL is in\n"
      "nats. KL(P||Q) is taken at each position, P being what --against... names. The KV cache is\n"
      "f32 (on CUDA f16) unless --kv says otherwise, and what is compared against has the same\n"
      "unless --against-kv says otherwise. But --against-backend reference computes in f32, with "
      "an\n"
      "f32 cache, from exactly dequantised weights, whatever --kv is. --weights and --device are\n"
      "for --backend alone.\n"
      "Examples:\n"
      "  nibble eval model-Q4_K_M.gguf --tokens heldout.i32\n"
      "  nibble eval model-Q4_K_M.gguf --tokens heldout.i32 --against model-f16.gguf --json\n"
      "  nibble eval model.gguf --tokens heldout.i32 --against-backend reference --limit 4\n"
      "  nibble eval model.gguf --tokens heldout.i32 --kv f16 --against-kv f32");
  command->callback([options] { eval(*options); });
}

}  // namespace nibble::app
