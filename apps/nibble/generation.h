#pragma once
// What run and chat share: the sampling options and the loop from a prompt to an answer.

#include <CLI/CLI.hpp>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace nibble::app {

// Each option overrides the model's own recommendation.
struct SamplingOptions {
  std::optional<float> temperature, top_p, min_p;
  std::optional<uint32_t> top_k;
  std::optional<float> repeat_penalty, presence_penalty, frequency_penalty;
  std::vector<std::string> logit_bias;  // "ID=BIAS"
  std::optional<uint64_t> seed;

  void add_to(CLI::App& command);
  // With a seed from the system where none is given. Throws Error on values that the engine
  // refuses.
  backend::SamplingParams resolve(const engine::Engine& engine) const;
};

enum class Finish { kStop, kLength, kCancelled };

struct Answer {
  std::vector<TokenId> tokens;  // the one that ended generation included
  std::string text, thought;
  Finish finish = Finish::kLength;
  uint32_t reused_tokens = 0;  // of the prompt, that the session already had
  double prefill_ms = 0;
  double decode_ms = 0;
  size_t decode_steps = 0;  // one less than tokens: the prefill draws the first

  double decode_tokens_per_s() const { return decode_ms > 0 ? 1e3 * decode_steps / decode_ms : 0; }
};

// Called with each piece of text as soon as it is whole.
using OnPiece = std::function<void(const text::AnswerStream::Piece& piece)>;

// Brings the session to `prompt` and generates until the model ends its turn, `max_tokens` are
// there, the context is full, or Ctrl-C. Throws Error as Session::sync does.
Answer generate(engine::Engine& engine, engine::Session& session, std::span<const TokenId> prompt,
                std::optional<uint32_t> max_tokens, const OnPiece& on_piece);

// What -v tells about an answer, on stderr.
void print_statistics(const Answer& answer, size_t prompt_tokens, uint64_t seed);

// Writes an answer to stdout as it comes: the thought, when it is asked for, apart from the rest.
class AnswerPrinter {
 public:
  explicit AnswerPrinter(bool with_thoughts) : with_thoughts_(with_thoughts) {}
  void print(const text::AnswerStream::Piece& piece);
  void finish();  // ends the last line

 private:
  void write(std::string_view text);

  const bool with_thoughts_;
  bool in_thought_ = false;
  char last_ = '\n';
};

}  // namespace nibble::app
