#pragma once
// What kernels must know of one step, gathered on the host and sent in one copy.

#include <cstddef>
#include <cstdint>
#include <map>
#include <vector>

#include "backend/backend.h"
#include "cuda/attention/attention.h"
#include "cuda/device_array.h"
#include "cuda/handles.h"
#include "cuda/memory/device_kv_store.h"
#include "cuda/sampling/sample.h"

namespace nibble::cuda {

// A row whose logits are wanted.
struct HeadRow {
  uint32_t row;   // of the step
  bool download;  // its logits are wanted on the host
  bool sample;
};

// Sizes that fix where everything lies and which kernels run: equal shapes may share a graph.
struct StepShape {
  uint32_t rows = 0;
  uint32_t single_rows = 0;  // rows [0, single_rows) are each the only one of their sequence
  uint32_t sequences = 0;
  uint32_t head_rows = 0;
  uint32_t requests = 0;
  uint32_t table_stride = 0;  // a power of two
  bool decode = false;        // each sequence has one row, draws a token and wants no logits

  auto operator<=>(const StepShape&) const = default;
};

class StepInputs {
 public:
  // most_head_rows: that go through the head together
  StepInputs(const DeviceKvStore& kv, uint32_t most_head_rows)
      : kv_(kv), most_head_rows_(most_head_rows) {}

  // Lists the batch's rows and starts the copy. Whether the device buffer is where it was before,
  // so that captured launches may go on reading it.
  bool send(const backend::Batch& batch, cudaStream_t stream);

  const StepShape& shape() const { return shape_; }
  const std::vector<HeadRow>& head() const { return head_; }  // in the batch's order
  uint32_t first_row(uint32_t sequence) const { return first_row_[sequence]; }
  // The most pages that the rows of a sequence see through a window, single rows excepted.
  uint32_t most_pages(uint32_t window) const;
  // Pairs of a row and a position that it sees through a window (0: none).
  uint64_t keys_seen(uint32_t window) const;

  // On the device:
  const int32_t* tokens() const { return at<int32_t>(tokens_); }    // [rows]
  const RowPlace* places() const { return at<RowPlace>(places_); }  // [rows]
  const SequenceRows* sequences() const { return at<SequenceRows>(sequences_); }
  const uint32_t* head_rows() const { return at<uint32_t>(head_rows_); }  // [head_rows]
  const DeviceRequest* requests() const { return at<DeviceRequest>(requests_); }
  const TokenBias* biases() const { return at<TokenBias>(lists_); }
  const TokenCount* seen() const { return at<TokenCount>(lists_); }
  BlockTables tables(uint32_t group) const {
    return {at<uint64_t>(tables_) + uint64_t(group) * shape_.sequences * shape_.table_stride,
            shape_.table_stride};
  }

 private:
  template <class T>
  const T* at(size_t offset) const {
    return reinterpret_cast<const T*>(device_.data() + offset);
  }
  void list_rows(const backend::Batch& batch);
  void list_head(const backend::Batch& batch);
  bool arrange();  // whether the buffers were large enough
  void fill_tables(const backend::Batch& batch);

  const DeviceKvStore& kv_;
  const uint32_t most_head_rows_;
  StepShape shape_;
  std::vector<uint32_t> order_;      // sequences: those of one row first
  std::vector<uint32_t> first_row_;  // of each sequence, in the batch's order
  std::vector<int32_t> token_list_;
  std::vector<RowPlace> place_list_;
  std::vector<SequenceRows> sequence_list_;  // in the batch's order
  std::vector<HeadRow> head_;
  DeviceRequests request_lists_;

  size_t tokens_ = 0, places_ = 0, sequences_ = 0, head_rows_ = 0, requests_ = 0, tables_ = 0,
         lists_ = 0;
  size_t bytes_ = 0;
  Pinned<std::byte> host_;
  DeviceArray<std::byte> device_;
};

}  // namespace nibble::cuda
