#pragma once
// The options that all commands share, and opening a model with them.

#include <CLI/CLI.hpp>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "backend/kv_format.h"
#include "engine/engine.h"

namespace nibble::app {

// For options that take a number: refuses NaN, infinities and what lies outside [low, high].
CLI::Validator finite_between(double low, double high);

// For options that take the name of a KV format, or `more`.
CLI::Validator is_kv_format(std::vector<std::string> more = {});

// Adds the positional MODEL.
void add_model(CLI::App& command, std::string& model);

// The file that MODEL names; the bundled tiny model when it is empty.
std::filesystem::path model_path(const std::string& model);

struct ModelOptions {
  std::string model;
  std::string backend = "auto";
  std::string weights = "auto";
  std::string kv = "auto", kv_window = "auto", kv_layout = "auto";
  uint32_t device = 0;
  uint32_t context = 0;
  uint32_t threads = 0;
  uint32_t ubatch = 0;
  bool verbose = false;

  void add_to(CLI::App& command);          // all but the context
  void add_context_to(CLI::App& command);  // -c
  // Without snapshots: most commands never go back.
  engine::EngineOptions engine_options() const;
};

// For commands that measure quality: where --kv leaves the choice, f32, so that the cache adds no
// rounding of its own, or f16 on a backend that has no f32; whatever the context.
void prefer_exact_kv(engine::EngineOptions& options);

struct OpenModel {
  std::unique_ptr<engine::Engine> engine;
  double load_ms;
};

// Opens with a progress bar, and says on stderr what runs where with which context.
OpenModel open_model(const ModelOptions& options, const engine::EngineOptions& engine_options);

// The model's tokenizer; Error(kUnsupported) where the file has none.
const text::Tokenizer& require_tokenizer(const engine::Engine& engine);
// The same without opening the model.
std::unique_ptr<const text::Tokenizer> open_tokenizer(const std::string& model);

// How many rows of logits take at most 256 MB; at least one.
uint32_t logit_rows_at_once(const engine::Engine& engine);

}  // namespace nibble::app
