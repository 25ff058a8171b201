#pragma once
// What comes from the user: whole texts, and lists of numbers.

#include <string>
#include <string_view>
#include <vector>

#include "base/id.h"

namespace nibble::app {

bool stdin_is_terminal();

// Everything, byte for byte. Throws Error(kIo) with the system's reason.
std::string read_stdin();
std::string read_file(const std::string& path);

// "512,2048" -> numbers; `option` is named when a part is no positive number.
// Throws CLI::ValidationError.
std::vector<uint32_t> parse_counts(std::string_view option, std::string_view text);

// "2,5,525" -> ids. Throws CLI::ValidationError.
std::vector<TokenId> parse_ids(std::string_view text);

}  // namespace nibble::app
