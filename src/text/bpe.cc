#include "text/bpe.h"

#include <algorithm>

#include "base/error.h"
#include "text/utf8.h"

namespace nibble::text {
namespace {

constexpr TokenId kNone{-1};    // a character that is no token
constexpr TokenId kMerged{-2};  // part of the symbol before it
constexpr uint32_t kEnd = UINT32_MAX;

}  // namespace

void Bpe::encode(std::string_view text, std::vector<TokenId>& out) {
  while (!text.empty()) {
    const bool newlines = text[0] == '\n';
    const size_t end = newlines ? text.find_first_not_of('\n') : text.find('\n');
    const std::string_view run = text.substr(0, end);
    const auto whole = newlines ? vocabulary_.find_plain(run) : std::nullopt;
    if (whole) {
      out.push_back(*whole);
    } else {
      encode_run(run, out);
    }
    text.remove_prefix(run.size());
  }
}

void Bpe::encode_run(std::string_view run, std::vector<TokenId>& out) {
  split(run);
  for (uint32_t i = 0; i + 1 < symbols_.size(); ++i) propose(i);
  merge_all();
  for (uint32_t i = 0; i != kEnd; i = symbols_[i].next) {
    const Symbol& symbol = symbols_[i];
    if (symbol.token != kNone) {
      out.push_back(symbol.token);
    } else if (run[symbol.begin] == ' ') {
      append_bytes(kSpaceMark, out);
    } else {
      const std::string_view rest = run.substr(symbol.begin);
      const Utf8Unit unit = first_unit(rest);
      append_bytes(rest.substr(0, unit.bytes), out);
    }
  }
}

void Bpe::split(std::string_view run) {
  symbols_.clear();
  for (size_t begin = 0; begin < run.size();) {
    const std::string_view rest = run.substr(begin);
    const Utf8Unit unit = first_unit(rest);
    const std::string_view character = rest[0] == ' ' ? kSpaceMark : rest.substr(0, unit.bytes);
    const auto token = unit.kind == Utf8::kWhole ? vocabulary_.find_plain(character) : std::nullopt;
    const auto index = uint32_t(symbols_.size());
    symbols_.push_back({token.value_or(kNone), uint32_t(begin), index - 1, index + 1});
    begin += unit.bytes;
  }
  symbols_.back().next = kEnd;
}

void Bpe::propose(uint32_t left) {
  const Symbol& symbol = symbols_[left];
  const auto rank = vocabulary_.find_merge(symbol.token, symbols_[symbol.next].token);
  if (rank) proposals_.push(uint64_t{*rank} << 32 | left);
}

void Bpe::merge_all() {
  while (!proposals_.empty()) {
    const uint64_t proposal = proposals_.top();
    proposals_.pop();
    const Vocabulary::Merge& merge = vocabulary_.merge(uint32_t(proposal >> 32));
    const auto index = uint32_t(proposal);
    Symbol& left = symbols_[index];
    // Earlier merges may have taken either side since.
    if (left.token != merge.left || left.next == kEnd) continue;
    Symbol& right = symbols_[left.next];
    if (right.token != merge.right) continue;

    left.token = merge.result;
    left.next = right.next;
    right.token = kMerged;
    if (left.next != kEnd) {
      symbols_[left.next].previous = index;
      propose(index);
    }
    if (index != 0) propose(left.previous);
  }
}

void Bpe::append_bytes(std::string_view character, std::vector<TokenId>& out) const {
  const auto byte_token = [&](char byte) { return vocabulary_.byte(uint8_t(byte)); };
  const auto missing = std::ranges::find_if(character, [&](char c) { return !byte_token(c); });
  if (missing == character.end()) {
    for (char byte : character) out.push_back(*byte_token(byte));
  } else if (vocabulary_.unknown()) {
    out.push_back(*vocabulary_.unknown());
  } else {
    fail(ErrorCode::kUnsupported,
         "the text has the byte 0x{:02X}, for which the vocabulary has no token, and no token for "
         "the unknown either",
         uint8_t(*missing));
  }
}

}  // namespace nibble::text
