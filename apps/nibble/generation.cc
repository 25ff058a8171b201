#include "nibble/generation.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <random>

#include "base/error.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

// "525=-2.5"
std::optional<std::pair<TokenId, float>> parse_bias(const std::string& text) {
  const size_t equals = text.find('=');
  TokenId token;
  float bias;
  if (equals == std::string::npos ||
      !CLI::detail::lexical_cast(text.substr(0, equals), token.value) ||
      !CLI::detail::lexical_cast(text.substr(equals + 1), bias) || !std::isfinite(bias)) {
    return std::nullopt;
  }
  return std::pair(token, bias);
}

std::string check_bias(const std::string& text) {
  return parse_bias(text) ? "" : text + " is not ID=BIAS, as in 525=-2.5";
}

// A double, as other numbers are checked, has too few bits.
std::string check_seed(const std::string& text) {
  uint64_t seed;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seed);
  if (error == std::errc() && end == text.data() + text.size()) return "";
  return fmt::format("{} is not a whole number from 0 to {}", text, UINT64_MAX);
}

uint64_t random_seed() {
  std::random_device device;
  return uint64_t{device()} << 32 | device();
}

}  // namespace

void SamplingOptions::add_to(CLI::App& command) {
  const std::string group = "Sampling (left out: what the model file recommends)";
  const auto add = [&](const char* name, auto& value, const char* help, double low, double high) {
    command.add_option(name, value, help)
        ->check(finite_between(low, high))
        ->type_name("X")
        ->group(group);
  };
  add("--temp", temperature, "Temperature; 0: always the most likely token", 0, 1e6);
  add("--top-k", top_k, "Only the K most likely tokens; 0: all", 0, UINT32_MAX);
  add("--top-p", top_p, "Only the most likely tokens that together have probability P", 1e-6, 1);
  add("--min-p", min_p, "Only tokens at least P times as likely as the best", 0, 1 - 1e-6);
  add("--repeat-penalty", repeat_penalty, "Make recent tokens less likely; 1: off", 1e-6, 1e6);
  add("--presence-penalty", presence_penalty, "Taken once from recent tokens' logits", -1e6, 1e6);
  add("--frequency-penalty", frequency_penalty, "Taken per use from recent tokens' logits", -1e6,
      1e6);
  command.add_option("--logit-bias", logit_bias, "Added to one token's logit; may be repeated")
      ->allow_extra_args(false)
      ->check(CLI::Validator(check_bias, ""))
      ->type_name("ID=BIAS")
      ->group(group);
  command.add_option("--seed", seed, "Same seed, same text; left out: a new one each time")
      ->check(CLI::Validator(check_seed, ""))
      ->type_name("N")
      ->group(group);
}

backend::SamplingParams SamplingOptions::resolve(const engine::Engine& engine) const {
  backend::SamplingParams params = engine.default_sampling();
  params.temperature = temperature.value_or(params.temperature);
  params.top_k = top_k.value_or(params.top_k);
  params.top_p = top_p.value_or(params.top_p);
  params.min_p = min_p.value_or(params.min_p);
  params.repetition_penalty = repeat_penalty.value_or(params.repetition_penalty);
  params.presence_penalty = presence_penalty.value_or(params.presence_penalty);
  params.frequency_penalty = frequency_penalty.value_or(params.frequency_penalty);
  for (const std::string& bias : logit_bias) params.logit_bias.push_back(*parse_bias(bias));
  params.seed = seed ? *seed : random_seed();
  params.validate(engine.plan().vocabulary);
  return params;
}

Answer generate(engine::Engine& engine, engine::Session& session, std::span<const TokenId> prompt,
                std::optional<uint32_t> max_tokens, const OnPiece& on_piece) {
  const text::Tokenizer& tokenizer = require_tokenizer(engine);
  text::AnswerStream stream(tokenizer);
  Answer answer;
  const auto emit = [&](const text::AnswerStream::Piece& piece) {
    if (piece.text.empty()) return;
    (piece.thought ? answer.thought : answer.text) += piece.text;
    on_piece(piece);
  };

  const CatchInterrupt interruptible(session);
  try {
    const Stopwatch prefill;
    {
      ProgressBar bar;
      answer.reused_tokens = session.sync(prompt, 0, bar.callback());
    }
    answer.prefill_ms = prefill.ms();

    const Stopwatch decode;
    while (!max_tokens || answer.tokens.size() < *max_tokens) {
      const TokenId token = session.next_token();
      answer.tokens.push_back(token);
      if (tokenizer.is_end_of_generation(token)) {
        answer.finish = Finish::kStop;
        break;
      }
      emit(stream.push(token));
      const bool last = max_tokens && answer.tokens.size() == *max_tokens;
      if (last || session.tokens().size() == engine.context()) break;
      session.extend({&token, 1});
      answer.decode_ms = decode.ms();
      ++answer.decode_steps;
    }
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kCancelled) throw;
    answer.finish = Finish::kCancelled;
  }
  emit(stream.finish());
  return answer;
}

void print_statistics(const Answer& answer, size_t prompt_tokens, uint64_t seed) {
  fmt::print(stderr,
             "{} prompt tokens ({} from the cache) in {:.0f} ms, {} tokens at {:.1f} a second, "
             "seed {}\n",
             prompt_tokens, answer.reused_tokens, answer.prefill_ms, answer.tokens.size(),
             answer.decode_tokens_per_s(), seed);
}

void AnswerPrinter::print(const text::AnswerStream::Piece& piece) {
  if (piece.thought && !with_thoughts_) return;
  if (in_thought_ && !piece.thought) write(last_ == '\n' ? "\n" : "\n\n");
  in_thought_ = piece.thought;
  write(piece.text);
}

void AnswerPrinter::finish() {
  if (last_ != '\n') write("\n");
}

void AnswerPrinter::write(std::string_view text) {
  std::fwrite(text.data(), 1, text.size(), stdout);
  std::fflush(stdout);
  last_ = text.back();
}

}  // namespace nibble::app
