// Writes the seeds of tokenizer_fuzz into the folder named by the argument: a byte for the kind of
// input, then a text, ids, or a GGUF file with a few tokens of every type.

#include <cstddef>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "support/small_vocabulary.h"

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::filesystem::path folder = argv[1];
  std::filesystem::create_directories(folder);
  const auto write = [&](const char* name, char kind, std::string_view rest) {
    std::ofstream(folder / name, std::ios::binary) << kind << rest;
  };

  write("text", 0, "ab  abc\n\n\n<b>!<|turn>user<turn|>\u2581\u00e9\u20ac\U0001f600\xe2\x96");
  write("ids", 1, std::string_view("\x00\x02\x00\x15\x00\xf4\x00\x94\x01\x20", 10));

  nibble::test::SmallVocabulary vocabulary;
  using Small = nibble::test::SmallVocabulary;
  for (const char* text : {"<unk>", "<eos>", "<bos>"}) vocabulary.add(text, Small::kControl);
  vocabulary.types[0] = Small::kUnknown;
  for (const char* text : {"<|turn>", "<turn|>", "<b>"}) vocabulary.add(text, Small::kUserDefined);
  for (const char* text : {"<0x00>", "<0xE2>"}) vocabulary.add(text, Small::kByte);
  for (const char* text : {"\u2581", "\n", "a", "o", "t", "e"}) vocabulary.add(text);
  vocabulary.add_merge("t", "o");
  vocabulary.add_merge("\n", "\n");
  const auto bytes =
      vocabulary.file()
          .f32_array("tokenizer.ggml.scores", std::vector<float>(vocabulary.tokens.size()))
          .u32("tokenizer.ggml.bos_token_id", 2)
          .u32("tokenizer.ggml.unknown_token_id", 0)
          .build();
  write("file", 2, {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}
