#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "text/tokenizer.h"

namespace nibble::text {

enum class Role { kSystem, kUser, kModel };

struct Message {
  Role role;
  std::string text;
};

// How a conversation is written for the model.
class ChatFormat {
 public:
  // nullptr when the vocabulary has no turn markers that we know.
  static std::unique_ptr<const ChatFormat> from_gguf(const gguf::GgufFile& file,
                                                     const Tokenizer& tokenizer);

  // Whether the model's template has a thought channel, so that `think` means something.
  bool can_think() const { return can_think_; }

  // BOS, all messages, and the opening of the model's next turn. Message text is trimmed and never
  // parsed for specials; earlier model turns lose their channels. `tokenizer` is the one the
  // format was made with.
  std::vector<TokenId> encode(std::span<const Message> messages, bool think) const;

 private:
  ChatFormat(const Tokenizer& tokenizer, bool can_think)
      : tokenizer_(tokenizer), can_think_(can_think) {}
  const Tokenizer& tokenizer_;
  bool can_think_;
};

// Splits a model's answer as it streams into thought and answer, and hides channel markers and ends
// of generation. `tokenizer` must outlive it.
class AnswerStream {
 public:
  struct Piece {
    std::string text;  // whole UTF-8 characters, may be empty
    bool thought;
  };
  explicit AnswerStream(const Tokenizer& tokenizer);
  Piece push(TokenId token);
  // What was still held back of an unfinished character.
  Piece finish();

 private:
  std::string without_name(std::string text);

  const Tokenizer& tokenizer_;
  Decoder decoder_;
  std::optional<TokenId> channel_open_, channel_close_;
  bool in_channel_ = false;
  bool channel_name_pending_ = false;  // the channel's first line is its name
};

}  // namespace nibble::text
