#pragma once
// Rows that share their sequence with others, as prefill kernels take them: query tiles, and runs
// of rows of one sequence.

#include "cuda/attention/keys.cuh"
#include "cuda/layouts/activations.cuh"

namespace nibble::cuda {

// Queries of a KV head in the workspace, as the store kernel leaves them for the prefill kernels:
// tiles of kQueryTile queries, those of query_tile_tokens() rows, row by row. A tile lies there as
// the tensor cores want it in shared memory: blocks of 64 dims, in them a query after the other,
// whose eight 16-byte chunks c stand at c ^ (query % 8).
struct QueryTiles {
  uint32_t kv_heads, head_dim, ratio, tile_tokens;

  __device__ explicit QueryTiles(const backend::AttentionShape& shape)
      : kv_heads(shape.kv_heads),
        head_dim(shape.head_dim),
        ratio(shape.query_heads / shape.kv_heads),
        tile_tokens(query_tile_tokens(shape)) {}

  // In f16.
  __device__ uint64_t tile(uint32_t index, uint32_t kv_head) const {
    return (uint64_t(index) * kv_heads + kv_head) * kQueryTile * head_dim;
  }
  __device__ static uint32_t in_tile(uint32_t query, uint32_t dim) {
    return dim / 64 * (kQueryTile * 64) + query * 64 + ((dim / 8 ^ query) % 8) * 8 + dim % 8;
  }
};

// Columns [dim, dim + 8) of a query's result; as store_activations() wants to be called. Results
// that are to be restored take the query's place.
__device__ __forceinline__ void store_result(const AttentionKernelArgs& args,
                                             const QueryTiles& tiles, uint32_t tile,
                                             uint32_t kv_head, uint32_t query, uint32_t dim,
                                             const float (&values)[8]) {
  if (args.layer.kv.restores_results()) {
    __half2 halves[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) halves[i] = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
    *reinterpret_cast<uint4*>(args.queries + tiles.tile(tile, kv_head) +
                              QueryTiles::in_tile(query, dim)) =
        *reinterpret_cast<const uint4*>(halves);
    return;
  }
  const uint32_t row = args.launch.single_rows + tile * tiles.tile_tokens + query / tiles.ratio;
  const uint32_t head = kv_head * tiles.ratio + query % tiles.ratio;
  store_activations(args.step.output, row, head * tiles.head_dim + dim, values);
}

// Rows of one sequence among a block's, and the keys they see.
struct Run {
  uint32_t begin, end;      // rows of the step
  uint32_t first_position;  // of row `begin`
  uint32_t stored;          // positions of the sequence that have keys
  uint32_t first_page, pages_end;
  uint32_t keys_end;  // of the section

  __device__ Run(const AttentionKernelArgs& args, uint32_t begin, uint32_t rows_end)
      : begin(begin), end(rows_end) {
    const RowPlace place = args.step.places[begin];
    // Mostly all of them, which the last one tells.
    if (args.step.places[rows_end - 1].sequence != place.sequence) {
      end = begin + 1;
      while (args.step.places[end].sequence == place.sequence) ++end;
    }
    first_position = place.position;
    stored = first_position + (end - begin);
    const VisibleKeys keys(first_position, args.layer.window);
    first_page = keys.first / backend::kKvPageTokens;
    pages_end = (stored + backend::kKvPageTokens - 1) / backend::kKvPageTokens;
    keys_end = stored;
    if (args.section.pages > 0) {
      const uint32_t position = args.step.sequences[place.sequence].first_position;
      const uint32_t section =
          VisibleKeys(position, args.layer.window).first / backend::kKvPageTokens +
          args.section.first;
      first_page = max(first_page, section);
      pages_end = min(pages_end, section + args.section.pages);
      keys_end = min(keys_end, pages_end * backend::kKvPageTokens);
    }
  }

  // The positions of the section that row `row` sees, none for a row of another run.
  struct Seen {
    uint32_t begin, end;
    __device__ bool has(uint32_t position) const { return position >= begin && position < end; }
  };
  __device__ Seen seen(uint32_t row, uint32_t window) const {
    if (row < begin || row >= end) return {0, 0};
    const uint32_t position = first_position + (row - begin);
    return {window == 0 || position < window ? 0 : position + 1 - window,
            min(position + 1, keys_end)};
  }
};

}  // namespace nibble::cuda
