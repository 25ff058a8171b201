#include "cuda/attention/attention_choice.h"

#include <algorithm>

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble::cuda {

namespace {

constexpr uint32_t kRuntimeBytes = 1024;  // of shared memory that every block costs besides its own

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
          .value_offset = layer.value_offset,
          .rotated = layer.row.format == backend::KvFormat::kTq4};
}

DecodeShape decode_shape(const DeviceShape& device, const backend::AttentionShape& shape,
                         const KvRows& rows) {
  const uint32_t head_dim = shape.head_dim, team = head_dim / part_dims(head_dim);
  const uint32_t scale_bytes = 2 * rows.row_scales;
  const uint32_t tile_bytes = kTeamKeys * part_row_stride(rows.format, head_dim, rows.block);
  const uint32_t tile_scales = kTeamKeys * scale_bytes;
  // Warps that have values beside the keys: in shared rows those of the RoPE block, without scales.
  const uint32_t with_values =
      rows.shared ? (rows.order.rope_dims + part_dims(head_dim) - 1) / part_dims(head_dim) : team;
  const uint32_t stages = decode_stages(rows.format);
  const uint32_t ring = team * (stages * tile_bytes + (stages + 1) * tile_scales) +
                        stages * with_values * (tile_bytes + (rows.shared ? 0 : tile_scales));
  const uint32_t results = kQueryColumns * result_stride(head_dim, rows.block) * 4;
  DecodeShape at = {};
  at.team_bytes = align(std::max(ring, results), 128);
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
    at.staged = place(rows.block == 0 ? 0
                                      : std::max(makers * staged_floats(head_dim) * 4,
                                                 rows.rotated ? results : 0));
    at.exchange = place(team == 1 ? 0 : teams * 2 * 2 * team * 32 * 16);
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
                        decode_warps_bytes(shape.head_dim, 1) > device.shared_bytes_per_block;
  // Many rows' blocks come in several rounds: of two on a multiprocessor one begins or ends while
  // the other one reads. Smaller heads' blocks leave room for a second one as they are.
  const bool share =
      blocks > device.multiprocessors && shape.head_dim == kSharingHeadDim &&
      decode_warps_bytes(shape.head_dim, 2) + kRuntimeBytes <= device.shared_bytes_per_block / 2;
  // Compressed rows have one shape of the older kernel for all devices.
  const bool in_blocks = kv.block != 0;
  const uint32_t shared_bytes = in_blocks ? kLeastSharedBytes : device.shared_bytes_per_block;
  return {rows,
          single_rows,
          blocks == 0 ? 1 : std::max(1u, device.multiprocessors / blocks),
          in_teams ? decode_shape(device, shape, kv) : DecodeShape{},
          share ? 2u : 1u,
          unit,
          mma_tile(shape.head_dim, shared_bytes)};
}

uint64_t most_split_parts(uint32_t multiprocessors) {
  constexpr uint64_t kMostHeadDim = 512;
  return multiprocessors * kQueryColumns * (kMostHeadDim / kPartColumns);
}

namespace {

// Of rows that are not single.
uint64_t query_tiles(const backend::AttentionShape& shape, const AttentionLaunch& launch) {
  constexpr uint32_t kTilesTogether = 4;  // the most that a kernel's cluster takes
  const uint32_t tokens = kTilesTogether * query_tile_tokens(shape);
  const uint64_t clusters = (launch.rows - launch.single_rows + tokens - 1) / tokens;
  return clusters * kTilesTogether * shape.kv_heads;
}

}  // namespace

uint64_t attention_workspace_bytes(const backend::AttentionShape& shape,
                                   const AttentionLaunch& launch) {
  return query_tiles(shape, launch) * kQueryTile * shape.head_dim * 2;
}

KeySections choose_sections(const backend::AttentionShape& shape, const KvRows& kv,
                            const AttentionLaunch& launch, uint32_t sequences, uint32_t chunks,
                            uint32_t most_pages, uint32_t table_stride, uint64_t scratch_bytes) {
  constexpr uint32_t kLeastRows = 32;  // of a sequence, on average, that share its expanded rows
  constexpr uint32_t kTilePages = 4;   // that a block takes at a time
  constexpr uint32_t kLeastPages = 8;  // or blocks hand over as much as they attend to
  constexpr uint64_t kStatistics = 2048;
  if (chunks == 0 || launch.rows - launch.single_rows < chunks * kLeastRows) return {};
  const uint64_t state_bytes =
      query_tiles(shape, launch) * (uint64_t{kQueryTile} * shape.head_dim * 4 + kStatistics);
  const uint64_t table_bytes = round_up(uint64_t{sequences} * table_stride * 8, uint64_t{256});
  const uint64_t section_page_bytes = uint64_t{chunks} * (kv.shared ? 1 : 2) * shape.kv_heads *
                                      backend::kKvPageTokens * kv.values() * 2;
  const auto pages_behind = [&](uint64_t begin) {
    return begin > scratch_bytes ? 0 : (scratch_bytes - begin) / section_page_bytes;
  };
  if (pages_behind(table_bytes) >= most_pages) return {most_pages, 0, table_bytes};
  const uint64_t pages_at = state_bytes + table_bytes;
  const uint64_t pages = std::min<uint64_t>(pages_behind(pages_at), most_pages);
  if (pages < kLeastPages) return {};
  return {uint32_t(pages - pages % kTilePages), state_bytes, pages_at};
}

}  // namespace nibble::cuda
