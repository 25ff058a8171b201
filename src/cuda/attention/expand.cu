// Compressed keys and values as pages of f16: a section of what the step's longer sequences see, in
// scratch memory, with block tables that lead there. A block has one head of a page.

#include "cuda/attention/kv_q8.cuh"
#include "cuda/attention/kv_tq4.cuh"
#include "cuda/attention/query_tiles.cuh"
#include "cuda/ptx.cuh"
#include "cuda/runtime.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kWarps = 8;

// A head's rows, a warp for each.
template <class Codec>
__device__ __forceinline__ void expand_rows(const KvRows& kv, const KvRow& from, __half* to) {
  const uint32_t lane = threadIdx.x % kLanes, block_bits = __popc(kv.block - 1);
  const uint32_t eights = kv.values() / 8;
#pragma unroll 4
  for (uint32_t row = threadIdx.x / kLanes; row < backend::kKvPageTokens; row += kWarps) {
    const uint32_t* const numbers =
        reinterpret_cast<const uint32_t*>(from.numbers + row * kv.row_bytes);
    for (uint32_t eight = lane; eight < eights; eight += kLanes) {
      uint32_t words[Codec::kEightWords];
#pragma unroll
      for (uint32_t i = 0; i < Codec::kEightWords; ++i)
        words[i] = numbers[eight * Codec::kEightWords + i];
      const __half scale = from.scales[row * kv.row_scales + (eight * 8 >> block_bits)];
      __half2 values[4];
      Codec::decode(words, values);
#pragma unroll
      for (__half2& pair : values) pair = __hmul2(pair, __half2half2(scale));
      reinterpret_cast<uint4*>(to)[row * eights + eight] = *reinterpret_cast<const uint4*>(values);
    }
  }
}

// grid: [pages of a section, KV heads, sequences]. `table`: [sequences, the step's stride]
template <class Codec>
__global__ void __launch_bounds__(kWarps* kLanes)
    expand_kernel(const __grid_constant__ AttentionKernelArgs args, const KvRows expanded,
                  char* pages, uint64_t* table) {
  ptx::launch_dependents();
  const KvRows& kv = args.layer.kv;
  const uint32_t sequence = blockIdx.z, head = blockIdx.y;
  const SequenceRows rows = args.step.sequences[sequence];
  if (rows.rows == 1) return;
  const uint32_t first = VisibleKeys(rows.first_position, args.layer.window).first;
  const uint32_t page = first / backend::kKvPageTokens + args.section.first + blockIdx.x;
  if (page * backend::kKvPageTokens >= rows.first_position + rows.rows) return;
  const uint64_t from = page_table(args.step, sequence)[page];
  const uint64_t to = uint64_t(pages) + (uint64_t(rows.index) * args.section.pages + blockIdx.x) *
                                            gridDim.y * expanded.head_bytes * (kv.shared ? 1 : 2);
  ptx::wait_for_dependencies();
  if (head == 0 && threadIdx.x == 0)
    table[uint64_t(sequence) * args.step.tables.stride + page] = to;
  const auto expand = [&](uint64_t offset, uint64_t expanded_offset) {
    expand_rows<Codec>(
        kv, page_row(from, kv, offset, head, 0),
        reinterpret_cast<__half*>(page_row(to, expanded, expanded_offset, head, 0).numbers));
  };
  expand(kv.key_offset, expanded.key_offset);
  if (!kv.shared) expand(kv.value_offset, expanded.value_offset);
}

KvRows expanded_rows(const KvRows& kv, uint32_t kv_heads) {
  KvRows rows = kv;
  rows.format = backend::KvFormat::kF16;
  rows.block = rows.row_scales = 0;
  rows.row_bytes = kv.values() * uint32_t(sizeof(__half));
  rows.head_bytes = backend::kKvPageTokens * rows.row_bytes;
  rows.key_offset = 0;
  rows.value_offset = kv.shared ? 0 : uint64_t{kv_heads} * rows.head_bytes;
  return rows;
}

}  // namespace

void launch_prefill_expanded(cudaStream_t stream, const AttentionKernelArgs& args,
                             const KeySections& sections) {
  const AttentionArgs& step = args.step;
  const uint32_t kv_heads = args.layer.shape.kv_heads;
  char* const scratch = static_cast<char*>(step.scratch);
  uint64_t* const table = reinterpret_cast<uint64_t*>(scratch + sections.table_at);
  const auto kernel = args.layer.kv.format == backend::KvFormat::kQ8 ? expand_kernel<CodecQ8>
                                                                     : expand_kernel<CodecTq4>;
  AttentionKernelArgs part = args;
  AttentionKernelArgs expanded = args;
  expanded.layer.kv = expanded_rows(args.layer.kv, kv_heads);
  expanded.step.tables.pages = table;
  for (uint32_t first = 0; first < step.most_pages; first += sections.pages) {
    part.section = {.first = first,
                    .pages = sections.pages,
                    .is_first = first == 0,
                    .is_last = first + sections.pages >= step.most_pages,
                    .state = reinterpret_cast<float4*>(scratch)};
    expanded.section = part.section;
    launch_dependent(stream, kernel, dim3(sections.pages, kv_heads, step.sequence_count),
                     kWarps * kLanes, 0, part, expanded.layer.kv, scratch + sections.pages_at,
                     table);
    launch_prefill_f16_wgmma(stream, expanded);
  }
}

}  // namespace nibble::cuda
