#include "text/chat.h"

#include <string_view>

#include "base/error.h"
#include "text/utf8.h"

namespace nibble::text {
namespace {

constexpr std::string_view kTurnOpen = "<|turn>", kTurnClose = "<turn|>";
constexpr std::string_view kChannelOpen = "<|channel>", kChannelClose = "<channel|>";
constexpr std::string_view kThink = "<|think|>";

std::string_view role_name(Role role) {
  switch (role) {
    case Role::kSystem:
      return "system";
    case Role::kUser:
      return "user";
    case Role::kModel:
      return "model";
  }
  NIBBLE_CHECK(false);
}

// An answer without its channels: what lies between a channel's markers goes, and so does a channel
// that never ends.
std::string without_channels(std::string_view answer) {
  std::string kept;
  while (!answer.empty()) {
    const size_t close = answer.find(kChannelClose);
    const std::string_view part = answer.substr(0, close);
    kept += part.substr(0, part.find(kChannelOpen));
    answer.remove_prefix(close == std::string_view::npos ? answer.size()
                                                         : close + kChannelClose.size());
  }
  return kept;
}

// Writes a prompt: markers by their token, text so that it can't become one.
class PromptWriter {
 public:
  explicit PromptWriter(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  PromptWriter& marker(std::string_view text) {
    const auto token = tokenizer_.find(text);
    NIBBLE_CHECK(token.has_value());  // ChatFormat::from_gguf saw to it
    tokens_.push_back(*token);
    return *this;
  }
  PromptWriter& text(std::string_view text) {
    const auto tokens = tokenizer_.encode(text, Specials::kText);
    tokens_.insert(tokens_.end(), tokens.begin(), tokens.end());
    return *this;
  }
  PromptWriter& token(TokenId token) {
    tokens_.push_back(token);
    return *this;
  }
  std::vector<TokenId> take() { return std::move(tokens_); }

 private:
  const Tokenizer& tokenizer_;
  std::vector<TokenId> tokens_;
};

}  // namespace

std::unique_ptr<const ChatFormat> ChatFormat::from_gguf(const gguf::GgufFile& file,
                                                        const Tokenizer& tokenizer) {
  if (!tokenizer.find(kTurnOpen) || !tokenizer.find(kTurnClose)) return nullptr;
  const std::string_view chat_template =
      file.find_string("tokenizer.chat_template").value_or(std::string_view());
  const bool can_think = chat_template.find("<|channel>thought") != std::string_view::npos &&
                         tokenizer.find(kChannelOpen) && tokenizer.find(kChannelClose) &&
                         tokenizer.find(kThink);
  return std::unique_ptr<const ChatFormat>(new ChatFormat(tokenizer, can_think));
}

std::vector<TokenId> ChatFormat::encode(std::span<const Message> messages, bool think) const {
  think = think && can_think_;
  PromptWriter prompt(tokenizer_);
  if (const auto bos = tokenizer_.bos()) prompt.token(*bos);

  // The system turn comes first, and is there for the thinking mark alone if need be.
  const bool has_system = !messages.empty() && messages.front().role == Role::kSystem;
  if (has_system || think) {
    prompt.marker(kTurnOpen).text("system\n");
    if (think) prompt.marker(kThink).text("\n");
    if (has_system) {
      prompt.text(trim(messages.front().text));
      messages = messages.subspan(1);
    }
    prompt.marker(kTurnClose).text("\n");
  }

  bool after_model = false;
  for (const Message& message : messages) {
    const bool is_model = message.role == Role::kModel;
    // The models' template writes consecutive answers under one heading.
    if (!(is_model && after_model)) {
      prompt.marker(kTurnOpen).text(role_name(message.role)).text("\n");
    }
    prompt.text(is_model ? trim(without_channels(message.text)) : trim(message.text));
    prompt.marker(kTurnClose).text("\n");
    after_model = is_model;
  }

  prompt.marker(kTurnOpen).text("model\n");
  if (can_think_ && !think) prompt.marker(kChannelOpen).text("thought\n").marker(kChannelClose);
  return prompt.take();
}

AnswerStream::AnswerStream(const Tokenizer& tokenizer)
    : tokenizer_(tokenizer),
      decoder_(tokenizer, /*with_specials=*/false),
      channel_open_(tokenizer.find(kChannelOpen)),
      channel_close_(tokenizer.find(kChannelClose)) {}

AnswerStream::Piece AnswerStream::push(TokenId token) {
  const bool opens = token == channel_open_;
  if (opens || token == channel_close_) {
    Piece last = finish();
    in_channel_ = channel_name_pending_ = opens;
    return last;
  }
  if (tokenizer_.is_end_of_generation(token)) return {"", in_channel_};
  return {without_name(decoder_.push(token)), in_channel_};
}

AnswerStream::Piece AnswerStream::finish() {
  return {without_name(decoder_.finish()), in_channel_};
}

std::string AnswerStream::without_name(std::string text) {
  if (!channel_name_pending_) return text;
  const size_t line_end = text.find('\n');
  if (line_end == std::string::npos) return {};
  channel_name_pending_ = false;
  return text.substr(line_end + 1);
}

}  // namespace nibble::text
