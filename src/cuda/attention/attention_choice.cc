#include "cuda/attention/attention_choice.h"

#include <algorithm>

#include "base/error.h"

namespace nibble::cuda {

namespace {

constexpr uint32_t align(uint32_t bytes, uint32_t to) {
  return (bytes + to - 1) / to * to;
}

}  // namespace

KvRows kv_rows(const backend::KvLayer& layer, uint32_t head_dim) {
  return {.format = layer.row.format,
          .shared = layer.shared.has_value(),
          .order = layer.shared.value_or(backend::SharedKvRow{head_dim, 0}),
          .block = layer.row.block,
          .row_bytes = layer.row.number_bytes(),
          .row_scales = layer.row.scales(),
          .head_bytes = uint32_t(layer.row.head_bytes()),
          .key_offset = layer.key_offset,
          .value_offset = layer.value_offset};
}

DecodeShape decode_shape(const DeviceShape& device, const backend::AttentionShape& shape,
                         const KvRows& rows) {
  const uint32_t head_dim = shape.head_dim, team = head_dim / part_dims(head_dim);
  const uint32_t scale_bytes = 2 * rows.row_scales;
  const uint32_t tile_bytes =
      kKeyTile * (part_row_stride(rows.format, head_dim, rows.block) + scale_bytes);
  const uint32_t results = kQueryColumns * result_stride(head_dim) * 4;
  DecodeShape at = {};
  at.team_bytes =
      align(std::max(team * decode_stages(rows.format, head_dim) * 2 * tile_bytes, results), 128);
  at.query_stride = head_dim * 2 + (rows.block != 0 ? 64 : 16);
  at.own_stride = align(rows.row_bytes + scale_bytes, 16);
  for (uint32_t teams = kMostDecodeWarps / team; teams > 0; --teams) {
    at.warps = teams * team;
    uint32_t end = teams * at.team_bytes;
    const auto place = [&](uint32_t bytes) {
      const uint32_t begin = end;
      end = align(begin + bytes, 16);
      return begin;
    };
    at.queries = place(kQueryColumns * at.query_stride);
    at.own_rows = place((rows.shared ? 1 : 2) * at.own_stride);
    const uint32_t makers = std::min(at.warps, kQueryColumns + 2);  // warps that make heads
    at.staged =
        place(rows.block == 0 ? 0 : std::max(makers * staged_floats(rows.values()) * 4, results));
    at.exchange = place(team == 1 ? 0 : teams * 2 * team * 32 * 16);
    at.statistics = place(2 * teams * kQueryColumns * 4);
    at.turns = place(head_dim / 2 * 8);
    at.bytes = end;
    if (at.bytes <= device.shared_bytes_per_block) return at;
  }
  fail(ErrorCode::kUnsupported,
       "a block of this GPU has {} bytes of shared memory, too few for attention with head_dim {}",
       device.shared_bytes_per_block, head_dim);
}

AttentionLaunch choose_attention(const DeviceShape& device, MatrixUnit unit,
                                 const backend::AttentionShape& shape, const KvRows& kv,
                                 uint32_t rows, uint32_t single_rows) {
  const uint32_t ratio = shape.query_heads / shape.kv_heads;
  const uint32_t column_groups = (ratio + kQueryColumns - 1) / kQueryColumns;
  const uint32_t blocks = single_rows * shape.kv_heads * column_groups;
  const bool in_teams = kv.shared || kv.block != 0 ||
                        decode_warps_bytes(shape.head_dim) > device.shared_bytes_per_block;
  // Compressed rows have one shape for all devices, and no kernel on wgmma.
  const bool in_blocks = kv.block != 0;
  const uint32_t shared_bytes = in_blocks ? kLeastSharedBytes : device.shared_bytes_per_block;
  return {rows,
          single_rows,
          blocks == 0 ? 1 : std::max(1u, device.multiprocessors / blocks),
          in_teams ? decode_shape(device, shape, kv) : DecodeShape{},
          in_blocks ? MatrixUnit::kMma : unit,
          mma_tile(shape.head_dim, shared_bytes)};
}

uint64_t most_split_parts(uint32_t multiprocessors) {
  constexpr uint64_t kMostHeadDim = 512;
  return multiprocessors * kQueryColumns * (kMostHeadDim / kPartColumns);
}

uint64_t attention_workspace_bytes(const backend::AttentionShape& shape,
                                   const AttentionLaunch& launch) {
  constexpr uint32_t kTilesTogether = 4;  // the most that a kernel's cluster takes
  const uint32_t tokens = kTilesTogether * query_tile_tokens(shape);
  const uint64_t clusters = (launch.rows - launch.single_rows + tokens - 1) / tokens;
  return clusters * kTilesTogether * kQueryTile * shape.kv_width() * 2;
}

}  // namespace nibble::cuda
