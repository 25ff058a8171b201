// nibble pack: a model file that a backend opens without repacking.

#include <fmt/format.h>

#include <csignal>

#include "engine/pack_model.h"
#include "nibble/commands.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"

namespace nibble::app {
namespace {

struct Options {
  std::string model, output;
  engine::PackOptions pack;
};

void pack(const Options& options) {
  std::signal(SIGXFSZ, SIG_IGN);  // a limit on the size of files is an error as a full disk is
  const Stopwatch watch;
  {
    const CatchInterrupt interrupt;
    ProgressBar bar;
    engine::pack_model(model_path(options.model), options.output, options.pack,
                       [&](std::string_view what, uint64_t done, uint64_t total) {
                         interrupt.check();
                         bar.update(what, done, total);
                       });
  }
  fmt::print(stderr, "{}: {}, packed for {} in {:.1f} s\n", printable(options.output),
             human_bytes(std::filesystem::file_size(options.output)), options.pack.backend,
             watch.ms() / 1e3);
}

}  // namespace

void add_pack(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* command =
      app.add_subcommand("pack", "Write a model as a backend takes it, so that it opens faster");
  add_model(*command, options->model);
  command->add_option("-o,--output", options->output, "The packed model to write")
      ->required()
      ->type_name("FILE");
  command->add_option("--backend", options->pack.backend, "For which backend; left out: cuda")
      ->check(CLI::IsMember({"cuda"}).description(""))
      ->type_name("NAME");
  command->add_option("--threads", options->pack.threads, "Threads; left out: one per core")
      ->check(finite_between(1, 1024))
      ->type_name("N");
  command->footer(
      "Needs no GPU. All commands open what it writes, on that backend; `nibble inspect` describes "
      "it.\n"
      "Example:\n"
      "  nibble pack model.gguf -o model.nibble");
  command->callback([options] { pack(*options); });
}

}  // namespace nibble::app
