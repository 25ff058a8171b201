// Writes the seed of packed_fuzz into the folder named by the argument: the smallest packed model.

#include <filesystem>
#include <fstream>

#include "engine/pack_model.h"
#include "engine/packed_format.h"
#include "support/fixtures.h"
#include "support/small_gemma4.h"

int main(int argc, char** argv) {
  using namespace nibble;
  if (argc != 2) return 2;
  const std::filesystem::path folder = argv[1];
  std::filesystem::create_directories(folder);
  const auto source = folder / "source.gguf", packed = folder / "packed";
  test::small_gemma4().write(source);
  engine::pack_model(source, packed, {.threads = 1});
  const std::string file = test::read_file(packed);
  engine::packed::Header header;
  file.copy(reinterpret_cast<char*>(&header), sizeof header);
  const size_t weights_begin = sizeof header + header.model_bytes;
  std::ofstream(folder / "small", std::ios::binary)
      << char((file.size() - weights_begin) / engine::packed::kPageBytes)
      << file.substr(sizeof header, header.model_bytes);
  std::filesystem::remove(source);
  std::filesystem::remove(packed);
}
