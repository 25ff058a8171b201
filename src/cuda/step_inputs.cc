#include "cuda/step_inputs.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "base/checked_math.h"

namespace nibble::cuda {

using backend::BatchSequence;
using backend::kKvPageTokens;

bool StepInputs::send(const backend::Batch& batch, cudaStream_t stream) {
  list_rows(batch);
  list_head(batch);
  const bool stays = arrange();
  const auto put = [&](size_t offset, const auto& values) {
    if (!values.empty()) {
      std::memcpy(&host_[offset], values.data(), values.size() * sizeof(values[0]));
    }
  };
  put(tokens_, token_list_);
  put(places_, place_list_);
  put(sequences_, sequence_list_);
  uint32_t* const head_rows = reinterpret_cast<uint32_t*>(&host_[head_rows_]);
  for (size_t i = 0; i < head_.size(); ++i) head_rows[i] = head_[i].row;
  // Biases and counts share one list, whose place depends on the shape alone.
  for (DeviceRequest& request : request_lists_.requests)
    request.first_seen += uint32_t(request_lists_.biases.size());
  put(requests_, request_lists_.requests);
  put(lists_, request_lists_.biases);
  put(lists_ + request_lists_.biases.size() * sizeof(TokenBias), request_lists_.seen);
  fill_tables(batch);
  NIBBLE_CUDA(cudaMemcpyAsync(device_.data(), host_.get(), bytes_, cudaMemcpyHostToDevice, stream));
  return stays;
}

void StepInputs::list_rows(const backend::Batch& batch) {
  shape_ = {};
  shape_.sequences = uint32_t(batch.sequences.size());
  order_.resize(shape_.sequences);
  first_row_.resize(shape_.sequences);
  for (uint32_t i = 0; i < shape_.sequences; ++i) order_[i] = i;
  const auto is_single = [&](uint32_t i) { return batch.sequences[i].tokens.size() == 1; };
  const auto others = std::stable_partition(order_.begin(), order_.end(), is_single);
  shape_.single_rows = uint32_t(others - order_.begin());
  token_list_.clear();
  place_list_.clear();
  sequence_list_.resize(shape_.sequences);
  uint32_t chunks = 0;
  size_t most_pages = 1;
  for (const uint32_t i : order_) {
    const BatchSequence& sequence = batch.sequences[i];
    first_row_[i] = uint32_t(token_list_.size());
    uint32_t position = sequence.kv->length();
    const uint32_t rows = uint32_t(sequence.tokens.size());
    sequence_list_[i] = {rows, position, rows > 1 ? chunks++ : 0};
    for (const TokenId token : sequence.tokens) {
      token_list_.push_back(token.value);
      place_list_.push_back({position++, i});
    }
    most_pages = std::max<size_t>(most_pages, (position - 1) / kKvPageTokens + 1);
  }
  shape_.rows = uint32_t(token_list_.size());
  shape_.table_stride = uint32_t(std::bit_ceil(most_pages));
}

void StepInputs::list_head(const backend::Batch& batch) {
  head_.clear();
  request_lists_.clear();
  shape_.decode = shape_.single_rows == shape_.rows;
  for (uint32_t i = 0; i < shape_.sequences; ++i) {
    const BatchSequence& sequence = batch.sequences[i];
    const uint32_t rows = std::max<uint32_t>(sequence.logit_rows, sequence.sample ? 1 : 0);
    const uint32_t end = first_row_[i] + uint32_t(sequence.tokens.size());
    for (uint32_t row = end - rows; row < end; ++row) {
      const bool sample = sequence.sample && row + 1 == end;
      if (sample) request_lists_.add(*sequence.sample, uint32_t(head_.size()) % most_head_rows_);
      head_.push_back({row, sequence.logit_rows > 0, sample});
    }
    shape_.decode = shape_.decode && sequence.sample && sequence.logit_rows == 0;
  }
  shape_.head_rows = uint32_t(head_.size());
  shape_.requests = uint32_t(request_lists_.requests.size());
}

uint32_t StepInputs::most_pages(uint32_t window) const {
  uint32_t most = 0;
  for (const SequenceRows& sequence : sequence_list_) {
    if (sequence.rows == 1) continue;
    const uint32_t before = sequence.first_position + 1;  // that the first row sees, and itself
    const uint32_t first = window == 0 ? 0 : before - std::min(before, window);
    const uint32_t last = sequence.first_position + sequence.rows - 1;
    most = std::max(most, last / kKvPageTokens - first / kKvPageTokens + 1);
  }
  return most;
}

uint64_t StepInputs::keys_seen(uint32_t window) const {
  uint64_t keys = 0;
  for (const RowPlace& place : place_list_) {
    const uint32_t all = place.position + 1;
    keys += window == 0 ? all : std::min(all, window);
  }
  return keys;
}

bool StepInputs::arrange() {
  size_t end = 0;
  const auto place = [&](size_t count, size_t size) {
    const size_t begin = round_up(end, size_t{16});
    end = begin + count * size;
    return begin;
  };
  tokens_ = place(shape_.rows, sizeof(int32_t));
  places_ = place(shape_.rows, sizeof(RowPlace));
  sequences_ = place(shape_.sequences, sizeof(SequenceRows));
  head_rows_ = place(shape_.head_rows, sizeof(uint32_t));
  requests_ = place(shape_.requests, sizeof(DeviceRequest));
  tables_ =
      place(kv_.groups().size() * shape_.sequences * size_t{shape_.table_stride}, sizeof(uint64_t));
  static_assert(sizeof(TokenBias) == sizeof(TokenCount));
  lists_ = place(request_lists_.biases.size() + request_lists_.seen.size(), sizeof(TokenBias));
  bytes_ = end;
  if (bytes_ <= device_.size()) return true;
  const size_t capacity = std::bit_ceil(std::max(bytes_, size_t{1} << 16));
  host_ = make_pinned<std::byte>(capacity);
  device_ = DeviceArray<std::byte>(capacity);
  return false;
}

void StepInputs::fill_tables(const backend::Batch& batch) {
  uint64_t* row = reinterpret_cast<uint64_t*>(&host_[tables_]);
  for (uint32_t group = 0; group < kv_.groups().size(); ++group) {
    for (const BatchSequence& sequence : batch.sequences) {
      const auto& table = sequence.kv->table(group);
      const size_t entries = std::min<size_t>(table.size(), shape_.table_stride);
      for (size_t i = 0; i < entries; ++i)
        row[i] = table[i] == backend::kNoPage ? 0 : kv_.address(group, table[i]);
      std::fill(row + entries, row + shape_.table_stride, 0);
      row += shape_.table_stride;
    }
  }
}

}  // namespace nibble::cuda
