#pragma once
// What linear needs from an instruction set: the product of a tile of weight rows with rows of
// activations. One generic source (kernels_generic.h) is compiled once per instruction set.
//
// Code compiled for an instruction set must not leak into the rest of the program: of two copies
// of an inline function the linker keeps any one, perhaps the one that only newer machines run.
// So those files keep everything in unnamed namespaces and call no inline function of a header,
// the standard library's included.

#include <cstddef>
#include <cstdint>

#include "cpu/isa.h"
#include "quant/quant_type.h"

namespace nibble::cpu {

// 32 activations as 8-bit numbers with one scale: value = scale * quants[i], |quants[i]| <= 127.
struct ActivationGroup {
  static constexpr uint32_t kValues = 32;
  int8_t quants[kValues];
  float scale;
  float sum;           // scale * sum of all quants: what a group's minimum is multiplied by
  float half_sums[2];  // the same for each 16
};
static_assert(sizeof(ActivationGroup) == 48);

// Whether weights of `type` are multiplied with 8-bit activations, else with f32 ones.
bool has_quantized_activations(quant::QuantType type);

inline constexpr uint32_t kMaxTileRows = 16;    // vector lanes of the widest instruction set
inline constexpr uint32_t kChunkColumns = 256;  // columns of a tile that are unpacked at a time

// A thread's own memory for one tile. Small enough for the first-level cache, `sums` aside.
struct alignas(64) TileScratch {
  // The chunk, unpacked: lane n of each vector belongs to the tile's row n.
  union {
    uint32_t quants[kChunkColumns / 4 * kMaxTileRows];  // [columns / 4][lane], 4 columns in each
    float values[kChunkColumns * kMaxTileRows];         // [column][lane]
  };
  float scales[kChunkColumns / 16 * kMaxTileRows];  // [group][lane]
  float minimums[kChunkColumns / 16 * kMaxTileRows];
  // Copies of the rows' blocks where they can't be read in place: dequantised ones, ends of rows.
  alignas(64) std::byte rows[kMaxTileRows][kChunkColumns * sizeof(float)];
};

// sums[m][n] = sum over k of x[m][k] * w[n][k]
struct TileJob {
  const std::byte* weights;  // the first row's blocks; rows are row_bytes apart
  size_t row_bytes;
  uint32_t rows;  // 1 to the kernels' tile_rows
  uint32_t columns;
  const quant::QuantTraits* traits;

  size_t activation_rows;
  // One of the two, as has_quantized_activations(traits->type) says.
  const ActivationGroup* quantized;  // [activation_rows, columns / 32]
  const float* activations;          // [activation_rows, columns]

  // The next tile's, fetched ahead; where none of as many bytes follows, this one's again.
  const std::byte* next_weights;
  TileScratch* scratch;
  float* sums;  // [activation_rows, tile_rows], 64-byte aligned
};

// Dequantises columns [column, column + columns) of the job's rows into scratch->rows, of any type.
void dequantize_chunk(const TileJob& job, uint32_t column, uint32_t columns);

struct Kernels {
  uint32_t tile_rows;
  // Rounds one row of `columns` values; a group with NaN or infinity gets the scale NaN.
  void (*quantize)(const float* values, uint32_t columns, ActivationGroup* groups);
  void (*multiply)(const TileJob& job);
};

const Kernels& linear_kernels(Isa isa);  // of an instruction set that this machine has

// Defined where they exist, one file each.
extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;

}  // namespace nibble::cpu
