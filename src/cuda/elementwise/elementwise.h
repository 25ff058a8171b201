#pragma once
// What happens between the matrices of a decode step, in as few kernels as the data allows.
//
// A row's values belong to one cluster of blocks (one block where there are none), so that its
// norms and its largest value need no second kernel. All of these wait for the kernel in front and
// let the next one start at once, to bring its first weights meanwhile.

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/layouts/activations.h"
#include "cuda/layouts/layouts.h"

namespace nibble::cuda {

// What the linears leave: row r is the sum over p of values[p][r].
struct Sums {
  const float* values;  // [parts, rows, stride]
  uint32_t parts;
  uint32_t rows;
  uint32_t stride;
};

// Activation rows that f16 can hold whatever their size: row r stands for scales[r] times its
// values. scales[r] is a power of two, and 1 unless a value goes beyond f16's range (gated ones: or
// has gone before).
struct ScaledRows {
  ActivationRows rows;
  float* scales;  // [rows.rows]
};

// x / sqrt(mean(x^2) + epsilon) * weight
struct DeviceNorm {
  const float* weight;  // [width], on the device; null: ones
  float epsilon;
  bool in_range;  // f16 holds every normed row: largest |weight| * sqrt(width) is no more
};

// What one block takes of a row; a cluster takes eight times as much.
inline constexpr uint32_t kMostRowColumns = 32 * 4 * kTileColumns;
// What a lane takes of one, at once.
inline constexpr uint32_t kPieceColumns = 8;
// Throws Error(kUnsupported) for rows wider than `most` or not a multiple of kPieceColumns wide.
void check_row_width(uint32_t width, uint32_t most);

// residual[r] = scale * row tokens[r] of the table; normed = norm(residual).
struct EmbedArgs {
  const void* tiles;  // of `layout`
  LayoutId layout;
  uint32_t width;
  // [rows]; null: row r is the table's row r, which the kernel in front has packed.
  const int32_t* tokens;
  float scale;
  float* residual;  // [rows, width]
  DeviceNorm norm;
  ScaledRows normed;
};
// As the step's first kernel, it needs no other to end (but one that packs its rows): its inputs
// were copied before.
void launch_embed(cudaStream_t stream, const EmbedArgs& args);

// residual = (residual + post_norm(scales * sums)) * output_scale; normed = next_norm(residual).
struct UpdateArgs {
  Sums sums;
  const float* scales;  // [rows], of the linear's input
  uint32_t width;
  bool has_post_norm;
  DeviceNorm post_norm;
  float output_scale;
  float* residual;  // [rows, width]
  DeviceNorm next_norm;
  ScaledRows normed;
};
void launch_update(cudaStream_t stream, const UpdateArgs& args);

// normed[i] = norm(residual[rows[i]])
struct NormArgs {
  const float* residual;  // [any, width]
  const uint32_t* rows;   // [normed.rows.rows]
  uint32_t width;
  DeviceNorm norm;
  ScaledRows normed;
};
void launch_norm(cudaStream_t stream, const NormArgs& args);

// gated = gelu_tanh(scales * gate) * (scales * up), where the sums' columns are [gate, up].
struct GatedArgs {
  Sums sums;
  const float* scales;  // [rows]
  uint32_t width;       // of gate and of up
  // What gated.scales becomes for all rows: a power of two, on the device. A row's own largest
  // value would have to be known to all blocks before the first one can store.
  const float* gated_scale;
  uint32_t* overflow;  // set to 1 when that was too small for a value
  ScaledRows gated;
};
void launch_gated_gelu(cudaStream_t stream, const GatedArgs& args);

// out[r] = scales[r] * sums[r], then, for a softcap other than 0, softcap * tanh(out / softcap).
// `out` may be where the sums are, if their stride is the width.
struct SumArgs {
  Sums sums;
  const float* scales;  // [rows]
  uint32_t width;
  float softcap;
  float* out;  // [rows, width]
};
void launch_sum(cudaStream_t stream, const SumArgs& args);

}  // namespace nibble::cuda
