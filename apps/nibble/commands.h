#pragma once
// One function per subcommand: adds its options to `app` and runs it when it is named.
//
// A command writes its result to stdout and everything else to stderr, and throws on failure:
// CLI::ParseError for a wrong command line (exit code 2), anything else for a failure (1).

#include <CLI/CLI.hpp>

namespace nibble::app {

void add_run(CLI::App& app);
void add_chat(CLI::App& app);
void add_eval(CLI::App& app);
void add_logits(CLI::App& app);
void add_tokenize(CLI::App& app);
void add_detokenize(CLI::App& app);
void add_inspect(CLI::App& app);
void add_pack(CLI::App& app);
void add_bench(CLI::App& app);
void add_devices(CLI::App& app);

}  // namespace nibble::app
