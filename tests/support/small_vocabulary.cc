#include "support/small_vocabulary.h"

#include <algorithm>
#include <stdexcept>

namespace nibble::test {

SmallVocabulary SmallVocabulary::standard() {
  SmallVocabulary made;
  for (const char* text : {"<pad>", "<eos>", "<bos>"}) made.add(text, kControl);
  made.add("<unk>", kUnknown);
  for (const char* text : {"<|turn>", "<turn|>", "<|think|>", "<|tool>", "<tool|>"}) {
    made.add(text, kControl);
  }
  for (const char* text : {"<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>",
                           "<|tool_response>", "<tool_response|>", "<|\"|>", "<b>", "<b>!"}) {
    made.add(text, kUserDefined);
  }
  for (int byte = 0; byte < 256; ++byte) {
    constexpr std::string_view kDigits = "0123456789ABCDEF";
    made.add(std::string("<0x") + kDigits[size_t(byte) / 16] + kDigits[size_t(byte) % 16] + '>',
             kByte);
  }
  made.add("\u2581");
  made.add("\n");
  for (char letter = 'a'; letter <= 'z'; ++letter) made.add(std::string(1, letter));
  for (const char* text : {"<", "|", ">", "0", "x", "\u00e9"}) made.add(text);
  made.add_merge("a", "b");
  made.add_merge("b", "c");
  made.add_merge("a", "a");
  made.add_merge("aa", "aa");
  made.add_merge("\u2581", "\u2581");
  made.add_merge("\u2581", "ab");
  made.add_merge("\n", "\n");
  return made;
}

int32_t SmallVocabulary::add(std::string_view text, int32_t type) {
  tokens.emplace_back(text);
  types.push_back(type);
  return int32_t(tokens.size()) - 1;
}

void SmallVocabulary::add_merge(const std::string& left, const std::string& right) {
  merges.push_back(left + " " + right);
  if (std::find(tokens.begin(), tokens.end(), left + right) == tokens.end()) add(left + right);
}

int32_t SmallVocabulary::id(std::string_view text) const {
  const auto found = std::find(tokens.begin(), tokens.end(), text);
  if (found == tokens.end()) throw std::runtime_error("no token " + std::string(text));
  return int32_t(found - tokens.begin());
}

GgufBuilder SmallVocabulary::file() const {
  GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gemma4")
      .string_array("tokenizer.ggml.tokens", tokens)
      .i32_array("tokenizer.ggml.token_type", types)
      .string_array("tokenizer.ggml.merges", merges);
  return builder;
}

}  // namespace nibble::test
