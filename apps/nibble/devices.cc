// nibble devices: what models can run on here.

#include "engine/devices.h"

#include <fmt/format.h>

#include "nibble/commands.h"
#include "nibble/terminal.h"

namespace nibble::app {

void add_devices(CLI::App& app) {
  CLI::App* command = app.add_subcommand("devices", "List what models can run on here");
  command->footer(
      "The first two columns are what --backend and --device take.\n"
      "Example:\n"
      "  nibble devices");
  command->callback([] {
    for (const engine::Device& device : engine::list_devices()) {
      fmt::print("{} {}  {}: {} cores, {}, {} of memory, {} free\n", device.backend, device.index,
                 printable(device.name), device.cores, device.isa, human_bytes(device.memory_bytes),
                 human_bytes(device.free_bytes));
    }
  });
}

}  // namespace nibble::app
