#pragma once
// Lists of numbers from people and files, and how many rows of logits to hold at a time.

#include <span>
#include <string_view>
#include <vector>

#include "base/id.h"
#include "engine/engine.h"

namespace nibble::app {

// "512,2048" -> numbers; `option` is named when a part is no positive number.
// Throws CLI::ValidationError.
std::vector<uint32_t> parse_counts(std::string_view option, std::string_view text);

// "2,5,525" -> ids. Throws CLI::ValidationError.
std::vector<TokenId> parse_ids(std::string_view text);

// How many rows of logits take at most 256 MB; at least one.
uint32_t logit_rows_at_once(const engine::Engine& engine);

}  // namespace nibble::app
