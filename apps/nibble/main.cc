#include <fmt/format.h>

#include <cstdio>
#include <new>

#include "base/error.h"
#include "nibble/commands.h"
#include "nibble/terminal.h"

namespace {

// Options by their names and what they take, without CLI11's notes on what excludes what.
class PlainFormatter : public CLI::Formatter {
 public:
  PlainFormatter() { column_width(30); }
  std::string make_option_opts(const CLI::Option* option) const override {
    const std::string type = option->get_type_name();
    return option->get_positional() || type.empty() ? "" : " " + type;
  }
};

constexpr int kFailed = 1;
constexpr int kUsage = 2;

int failed(std::string_view message) {
  fmt::print(stderr, "nibble: {}\n", nibble::app::printable(message));
  return kFailed;
}

int run(int argc, char** argv) {
  CLI::App app("Nibble runs GGUF language models.", "nibble");
  app.footer(
      "Examples:\n"
      "  nibble run -p 'Define freedom.'             ask the bundled tiny model\n"
      "  nibble run model.gguf -f question.txt       ask a model of yours\n"
      "  nibble chat model.gguf                      talk with it\n"
      "  nibble inspect model.gguf                   what is in the file, what memory it needs\n"
      "`nibble COMMAND --help` tells more. Exit codes: 0 done, 1 failed, 2 wrong command line.");
  app.set_version_flag("--version", "nibble " NIBBLE_COMMIT);
  app.require_subcommand(1);
  app.formatter(std::make_shared<PlainFormatter>());
  nibble::app::add_run(app);
  nibble::app::add_chat(app);
  nibble::app::add_eval(app);
  nibble::app::add_logits(app);
  nibble::app::add_tokenize(app);
  nibble::app::add_detokenize(app);
  nibble::app::add_inspect(app);
  nibble::app::add_pack(app);
  nibble::app::add_bench(app);
  nibble::app::add_devices(app);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kUsage;
  } catch (const std::bad_alloc&) {
    return failed("out of memory; a smaller context (-c) needs less");
  } catch (const std::exception& error) {
    return failed(error.what());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) return failed("can't write to stdout");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv);
}
