#pragma once
// Attention: from the sums of the fused q/k/v linear to the activations of the output projection.
//
// Norms of query, key and value heads, RoPE, storing keys and values in their pages, attention over
// the pages, for rows of several sessions side by side. All that changes from step to step lies in
// device memory: a captured launch can be replayed.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "backend/kv_format.h"
#include "backend/plan.h"
#include "cuda/attention/attention_choice.h"
#include "cuda/layouts/activations.h"

namespace nibble::cuda {

// Where a row of the step belongs. In device memory, written before the step's first kernel.
struct RowPlace {
  uint32_t position;
  uint32_t sequence;  // row of the block tables
};

// Rows of one sequence in the step. In device memory, written before the step's first kernel.
struct SequenceRows {
  uint32_t rows;
  uint32_t first_position;
  uint32_t index;  // among the sequences of more than one row
};

// The block tables of a KvGroup: entry (s, i) is the device address of the page that holds
// positions [32 i, 32 i + 32) of sequence s. Entries that no row of the step can see may be
// anything. In device memory, written before the step's first kernel; pages as in
// docs/formats/kv-pages.md.
struct BlockTables {
  const uint64_t* pages;  // [sequences, stride]
  uint32_t stride;
};

// RMS norm of a head; all ones where weight is null.
struct HeadNorm {
  bool enabled;
  float epsilon;
  const float* weight;  // [head_dim], on the device
};

// What a layer's NormQkvStep and AttendStep say, and where its cache lies.
struct AttentionLayer {
  backend::AttentionShape shape;  // head_dim 64, 128, 256 or 512
  uint32_t window;                // positions that a query sees, its own included; 0: all
  float scale;
  bool value_is_key;  // the sums have no v columns
  HeadNorm query_norm, key_norm, value_norm;
  const float* inverse_frequencies;  // [head_dim / 2], on the device
  KvRows kv;
};

struct AttentionArgs {
  const RowPlace* places;         // [rows]
  const SequenceRows* sequences;  // [sequence_count]
  BlockTables tables;             // of the layer's group
  uint32_t sequence_count;
  // Of the sequences of more than one row: how many, and the most pages that the rows of one see.
  uint32_t chunks, most_pages;

  // q, k and v of every row, before norms: parts to be added, as the linear leaves them
  const float* sums;  // [parts, rows, stride]; query_width + kv_width (+ kv_width) columns
  uint32_t parts;
  uint32_t stride;

  // All layers may share these. All bits of the parts are one before the first launch, and each
  // launch leaves them so.
  void* workspace;         // attention_workspace_bytes()
  SplitPart* split_parts;  // most_split_parts()

  // For what choose_sections() says; may be the memory of the sums, which are read before.
  void* scratch;
  uint64_t scratch_bytes;

  ActivationRows output;  // [rows, query_width]
};

// Throws Error(kUnsupported) for heads without a kernel.
void check_heads(const backend::AttentionShape& shape);

// Starts the kernels: one for single rows; one that stores the other rows' queries, keys and values
// and one that attends. Other rows of one sequence stand together, at consecutive positions. Pages
// of earlier steps are read before the kernel in front has ended: no kernel of the same step may
// write them. Throws Error(kUnsupported) for heads or a format without a kernel.
void launch_attention(cudaStream_t stream, const AttentionLayer& layer,
                      const AttentionLaunch& launch, const AttentionArgs& args);

}  // namespace nibble::cuda
