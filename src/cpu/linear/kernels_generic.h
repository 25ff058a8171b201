// No include guard: each instruction set's file includes this once, after its `Simd`:
//
//   struct Simd {
//     // 32-bit lanes of a vector, which is also the weight rows of a tile.
//     static constexpr int kLanes;
//     // Activation rows multiplied at a time, a power of two.
//     static constexpr int kActivationRows;
//     // Whether the weights that dot() takes are in -128..127, else in 0..255.
//     static constexpr bool kSignedQuants;
//     // GNU vectors of kLanes lanes.
//     typedef uint32_t U32; typedef int32_t I32; typedef float F32;
//
//     // Bytes [0, 16) of kLanes rows, as four columns of 32-bit words.
//     static void load_columns(const std::byte* rows, size_t stride, U32 (&columns)[4]);
//     // Of each lane's low 16 bits; the high ones are 0.
//     static F32 half_to_float(U32 halves);
//     static F32 fma(F32 a, F32 b, F32 c);   // a * b + c
//     static F32 fnma(F32 a, F32 b, F32 c);  // c - a * b
//     // Lane n: the sum of 4 * kSteps products of row n's bytes, at most kMaximum large, with x.
//     template <int kMaximum, int kSteps>
//     static I32 dot(const U32 (&w)[kSteps], const int8_t* x);
//     // sums[k % 2] += w[k] * x[k] for k < 4
//     static void fma4(const F32 (&w)[4], const float* x, F32 (&sums)[2]);
//   };
//
// A lane is a weight row. Blocks are read 16 bytes a row, transposed as 32-bit words, and from
// there on every format's bit fiddling, its scales and minimums are plain arithmetic on vectors,
// the same on every machine. The product then needs no sums across lanes, and since a row of
// activations meets the weights in the same order however many run together, neither do results
// depend on the batch.

#include "quant/q4_0.h"
#include "quant/q4_k.h"
#include "quant/q5_k.h"
#include "quant/q6_k.h"
#include "quant/q8_0.h"

namespace nibble::cpu {
namespace {

using quant::QuantType;
using U32 = Simd::U32;
using I32 = Simd::I32;
using F32 = Simd::F32;
constexpr int kLanes = Simd::kLanes;

template <class V, class T>
V load(const T* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V, class T>
void store(T* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Subtracting zero, unlike adding it, is the identity for compilers too.
F32 splat(float value) {
  return value - F32{};
}

F32 to_float(U32 v) {
  return __builtin_convertvector((I32)v, F32);
}

// The rows of a chunk: where it starts in the first one, and how far they are apart.
struct Rows {
  const std::byte* bytes;
  size_t stride;
  const std::byte* next;  // as far into the next tile as the chunk lies in its own; only prefetched
};

// Each call also asks for as much of the next tile, so that memory is read in one sweep although
// the rows of a tile are read side by side.
void load_columns(Rows rows, size_t offset, U32 (&columns)[4]) {
  constexpr int kCacheLine = 64;
  for (int i = 0; i < 16 * kLanes; i += kCacheLine) {
    __builtin_prefetch(rows.next + offset * kLanes + i);
  }
  Simd::load_columns(rows.bytes + offset, rows.stride, columns);
}

// The half float at `offset` of each row.
F32 load_halves(Rows rows, size_t offset) {
  uint32_t halves[kLanes];
  for (int n = 0; n < kLanes; ++n) {
    uint16_t half;
    __builtin_memcpy(&half, rows.bytes + n * rows.stride + offset, sizeof half);
    halves[n] = half;
  }
  return Simd::half_to_float(load<U32>(halves));
}

void store_quants(TileScratch& tile, int word, U32 quants) {
  store(tile.quants + word * kLanes, quants);
}

void store_scale(TileScratch& tile, int group, F32 scale, F32 minimum) {
  store(tile.scales + group * kLanes, scale);
  store(tile.minimums + group * kLanes, minimum);
}

// ---- Unpacking: weight = scale * quant - minimum, quant an 8-bit number ----
//
// Each format says how large a block and a quant are, how many values share a scale, and unpacks
// one block of every row, the chunk's block number `block`. Words are four quants each.

// Block scale, block minimum and the 6-bit scales and minimums: the first 16 bytes.
void unpack_k_scales(Rows rows, TileScratch& tile) {
  static_assert(offsetof(quant::BlockQ4K, scales) == 4 && offsetof(quant::BlockQ5K, scales) == 4);
  U32 header[4];
  load_columns(rows, 0, header);
  const F32 scale = Simd::half_to_float(header[0] & 0xffff);
  const F32 minimum = Simd::half_to_float(header[0] >> 16);
  const U32 scales[2] = {header[1] & 0x3f3f3f3f,
                         (header[3] & 0x0f0f0f0f) | (header[1] >> 2 & 0x30303030)};
  const U32 minimums[2] = {header[2] & 0x3f3f3f3f,
                           (header[3] >> 4 & 0x0f0f0f0f) | (header[2] >> 2 & 0x30303030)};
  for (int g = 0; g < 8; ++g) {
    const int shift = 8 * (g % 4);
    store_scale(tile, g, scale * to_float(scales[g / 4] >> shift & 0xff),
                minimum * to_float(minimums[g / 4] >> shift & 0xff));
  }
}

struct Q4K {
  using Block = quant::BlockQ4K;
  static constexpr int kMaximum = 15;
  static constexpr int kGroup = 32;

  static void unpack(Rows rows, int, TileScratch& tile) {
    unpack_k_scales(rows, tile);
    for (int i = 0; i < 8; ++i) {  // 16 bytes: words 4 i of the low nibbles' and high nibbles' 32
      U32 packed[4];
      load_columns(rows, offsetof(Block, quants) + 16 * i, packed);
      const int word = i / 2 * 16 + i % 2 * 4;
      for (int c = 0; c < 4; ++c) {
        store_quants(tile, word + c, packed[c] & 0x0f0f0f0f);
        store_quants(tile, word + c + 8, packed[c] >> 4 & 0x0f0f0f0f);
      }
    }
  }
};

struct Q5K {
  using Block = quant::BlockQ5K;
  static constexpr int kMaximum = 31;
  static constexpr int kGroup = 32;

  static void unpack(Rows rows, int, TileScratch& tile) {
    unpack_k_scales(rows, tile);
    for (int half = 0; half < 2; ++half) {
      U32 high[4];
      load_columns(rows, offsetof(Block, high_bits) + 16 * half, high);
      for (int i = 0; i < 4; ++i) {
        U32 packed[4];
        load_columns(rows, offsetof(Block, quants) + 32 * i + 16 * half, packed);
        for (int c = 0; c < 4; ++c) {
          const int word = i * 16 + half * 4 + c;
          store_quants(tile, word,
                       (packed[c] & 0x0f0f0f0f) | (high[c] >> (2 * i) & 0x01010101) << 4);
          store_quants(tile, word + 8,
                       (packed[c] >> 4 & 0x0f0f0f0f) | (high[c] >> (2 * i + 1) & 0x01010101) << 4);
        }
      }
    }
  }
};

struct Q6K {
  using Block = quant::BlockQ6K;
  static constexpr int kMaximum = 63;
  static constexpr int kGroup = 16;

  static void unpack(Rows rows, int, TileScratch& tile) {
    unpack_scales(rows, tile);
    for (int i = 0; i < 4;
         ++i) {  // 16 bytes of high bits: 128 values' half i / 2, columns of i % 2
      U32 high[4], low[2][4];
      load_columns(rows, offsetof(Block, high_bits) + 16 * i, high);
      for (int j = 0; j < 2; ++j) {
        load_columns(rows, offsetof(Block, low_bits) + i / 2 * 64 + 32 * j + i % 2 * 16, low[j]);
      }
      for (int j = 0; j < 4; ++j) {
        for (int c = 0; c < 4; ++c) {
          store_quants(
              tile, i / 2 * 32 + 8 * j + i % 2 * 4 + c,
              (low[j % 2][c] >> (j / 2 * 4) & 0x0f0f0f0f) | (high[c] >> (2 * j) & 0x03030303) << 4);
        }
      }
    }
  }

  static void unpack_scales(Rows rows, TileScratch& tile) {
    const F32 block_scale = load_halves(rows, offsetof(Block, scale));
    U32 scales[4];
    load_columns(rows, offsetof(Block, scales), scales);
    for (int g = 0; g < 16; ++g) {
      const I32 scale = (I32)(scales[g / 4] << (24 - 8 * (g % 4))) >> 24;
      const F32 value = block_scale * __builtin_convertvector(scale, F32);
      store_scale(tile, g, value, value * 32.0f);
    }
  }
};

struct Q8_0 {
  using Block = quant::BlockQ8_0;
  static constexpr int kMaximum = Simd::kSignedQuants ? 128 : 255;
  static constexpr int kGroup = 32;

  static void unpack(Rows rows, int block, TileScratch& tile) {
    constexpr uint32_t kFlipSigns = Simd::kSignedQuants ? 0 : 0x80808080;
    constexpr float kOffset = Simd::kSignedQuants ? 0 : 128;
    const F32 scale = load_halves(rows, offsetof(Block, scale));
    store_scale(tile, block, scale, scale * kOffset);
    for (int i = 0; i < 2; ++i) {
      U32 packed[4];
      load_columns(rows, offsetof(Block, quants) + 16 * i, packed);
      for (int c = 0; c < 4; ++c) store_quants(tile, block * 8 + i * 4 + c, packed[c] ^ kFlipSigns);
    }
  }
};

struct Q4_0 {
  using Block = quant::BlockQ4_0;
  static constexpr int kMaximum = 15;
  static constexpr int kGroup = 32;

  static void unpack(Rows rows, int block, TileScratch& tile) {
    const F32 scale = load_halves(rows, offsetof(Block, scale));
    store_scale(tile, block, scale, scale * 8.0f);
    U32 packed[4];
    load_columns(rows, offsetof(Block, quants), packed);
    for (int c = 0; c < 4; ++c) {
      store_quants(tile, block * 8 + c, packed[c] & 0x0f0f0f0f);
      store_quants(tile, block * 8 + c + 4, packed[c] >> 4 & 0x0f0f0f0f);
    }
  }
};

// ---- Unpacking to f32 ----

void unpack_f32(Rows rows, int columns, TileScratch& tile) {
  for (int k = 0; k < columns; k += 4) {
    U32 values[4];
    load_columns(rows, k * sizeof(float), values);
    for (int c = 0; c < 4; ++c) store(tile.values + (k + c) * kLanes, values[c]);
  }
}

void unpack_f16(Rows rows, int columns, TileScratch& tile) {
  for (int k = 0; k < columns; k += 8) {
    U32 pairs[4];
    load_columns(rows, k * sizeof(uint16_t), pairs);
    for (int c = 0; c < 4; ++c) {
      float* values = tile.values + (k + 2 * c) * kLanes;
      store(values, Simd::half_to_float(pairs[c] & 0xffff));
      store(values + kLanes, Simd::half_to_float(pairs[c] >> 16));
    }
  }
}

void unpack_bf16(Rows rows, int columns, TileScratch& tile) {
  for (int k = 0; k < columns; k += 8) {
    U32 pairs[4];
    load_columns(rows, k * sizeof(uint16_t), pairs);
    for (int c = 0; c < 4; ++c) {
      float* values = tile.values + (k + 2 * c) * kLanes;
      store(values, pairs[c] << 16);
      store(values + kLanes, pairs[c] & 0xffff0000);
    }
  }
}

// ---- Products with the unpacked chunk ----

// `x` points at the chunk's first group of the first of kRows activation rows.
template <class Format, int kRows>
void multiply_quantized_rows(const TileScratch& tile, int groups, const ActivationGroup* x,
                             size_t stride, float* sums) {
  constexpr int kScales = ActivationGroup::kValues / Format::kGroup;
  constexpr int kSteps = Format::kGroup / 4;
  F32 sum[kRows];
  for (int m = 0; m < kRows; ++m) sum[m] = load<F32>(sums + m * kLanes);
  for (int g = 0; g < groups; ++g) {
    for (int s = 0; s < kScales; ++s) {
      const int scale_index = g * kScales + s;
      const F32 scale = load<F32>(tile.scales + scale_index * kLanes);
      const F32 minimum = load<F32>(tile.minimums + scale_index * kLanes);
      U32 w[kSteps];
      for (int i = 0; i < kSteps; ++i) {
        w[i] = load<U32>(tile.quants + (scale_index * kSteps + i) * kLanes);
      }
      for (int m = 0; m < kRows; ++m) {
        const ActivationGroup& group = x[m * stride + g];
        const I32 dot = Simd::dot<Format::kMaximum>(w, group.quants + s * Format::kGroup);
        const float x_sum = kScales == 1 ? group.sum : group.half_sums[s];
        sum[m] = Simd::fma(__builtin_convertvector(dot, F32), scale * group.scale, sum[m]);
        sum[m] = Simd::fnma(minimum, splat(x_sum), sum[m]);
      }
    }
  }
  for (int m = 0; m < kRows; ++m) store(sums + m * kLanes, sum[m]);
}

template <int kRows>
void multiply_float_rows(const TileScratch& tile, int columns, const float* x, size_t stride,
                         float* sums) {
  F32 sum[kRows][2];  // of even and odd columns: two chains of additions keep the adders busy
  for (int m = 0; m < kRows; ++m) {
    sum[m][0] = load<F32>(sums + m * kLanes);
    sum[m][1] = F32{};
  }
  int k = 0;
  for (; k + 4 <= columns; k += 4) {
    F32 w[4];
    for (int c = 0; c < 4; ++c) w[c] = load<F32>(tile.values + (k + c) * kLanes);
    for (int m = 0; m < kRows; ++m) Simd::fma4(w, x + m * stride + k, sum[m]);
  }
  for (; k < columns; ++k) {
    const F32 w = load<F32>(tile.values + k * kLanes);
    for (int m = 0; m < kRows; ++m) {
      sum[m][0] = Simd::fma(w, splat(x[m * stride + k]), sum[m][0]);
    }
  }
  for (int m = 0; m < kRows; ++m) store(sums + m * kLanes, sum[m][0] + sum[m][1]);
}

// ---- Tiles ----

// A chunk's blocks: in place, or copied where there are too few rows or bytes to read it in
// vectors.
Rows chunk_rows(const TileJob& job, size_t offset, size_t bytes, bool readable) {
  const std::byte* next = job.next_weights + offset * kLanes;
  if (readable && job.rows == uint32_t(kLanes)) return {job.weights + offset, job.row_bytes, next};
  TileScratch& scratch = *job.scratch;
  for (uint32_t n = 0; n < uint32_t(kLanes); ++n) {
    const uint32_t row = n < job.rows ? n : 0;  // the surplus lanes' sums are never looked at
    __builtin_memcpy(scratch.rows[n], job.weights + row * job.row_bytes + offset, bytes);
  }
  return {scratch.rows[0], sizeof scratch.rows[0], next};
}

// Calls product.run<n>(m) for blocks of n rows from m on that cover the job's activation rows.
template <int kRows, class Product>
void for_each_row_block(const Product& product, size_t rows, size_t m = 0) {
  for (; m + kRows <= rows; m += kRows) product.template run<kRows>(m);
  if constexpr (kRows > 1) for_each_row_block<kRows / 2>(product, rows, m);
}

template <class Format>
struct QuantizedProduct {
  const TileJob& job;
  uint32_t column, columns;

  template <int kRows>
  void run(size_t m) const {
    const size_t stride = job.columns / ActivationGroup::kValues;
    multiply_quantized_rows<Format, kRows>(
        *job.scratch, columns / ActivationGroup::kValues,
        job.quantized + m * stride + column / ActivationGroup::kValues, stride,
        job.sums + m * kLanes);
  }
};

struct FloatProduct {
  const TileJob& job;
  uint32_t column, columns;

  template <int kRows>
  void run(size_t m) const {
    multiply_float_rows<kRows>(*job.scratch, columns, job.activations + m * job.columns + column,
                               job.columns, job.sums + m * kLanes);
  }
};

template <class Format>
void multiply_quantized(const TileJob& job, uint32_t column, uint32_t columns) {
  using Block = typename Format::Block;
  const int blocks = columns / Block::kValues;
  const Rows rows = chunk_rows(job, column / Block::kValues * sizeof(Block), blocks * sizeof(Block),
                               /*readable=*/true);
  for (int block = 0; block < blocks; ++block) {
    Format::unpack({rows.bytes + block * sizeof(Block), rows.stride,
                    rows.next + block * sizeof(Block) * kLanes},
                   block, *job.scratch);
  }
  for_each_row_block<Simd::kActivationRows>(QuantizedProduct<Format>{job, column, columns},
                                            job.activation_rows);
}

template <void (*kUnpack)(Rows, int, TileScratch&), size_t kValueBytes>
void multiply_float(const TileJob& job, uint32_t column, uint32_t columns) {
  const size_t bytes = columns * kValueBytes;
  const Rows rows = chunk_rows(job, column * kValueBytes, bytes, bytes % 16 == 0);
  kUnpack(rows, columns, *job.scratch);
  for_each_row_block<Simd::kActivationRows>(FloatProduct{job, column, columns},
                                            job.activation_rows);
}

void multiply_dequantized(const TileJob& job, uint32_t column, uint32_t columns) {
  dequantize_chunk(job, column, columns);
  unpack_f32({job.scratch->rows[0], sizeof job.scratch->rows[0], job.next_weights}, columns,
             *job.scratch);
  for_each_row_block<Simd::kActivationRows>(FloatProduct{job, column, columns},
                                            job.activation_rows);
}

using MultiplyChunk = void (*)(const TileJob&, uint32_t column, uint32_t columns);

MultiplyChunk multiply_chunk(QuantType type) {
  switch (type) {
    case QuantType::kQ4_K:
      return multiply_quantized<Q4K>;
    case QuantType::kQ5_K:
      return multiply_quantized<Q5K>;
    case QuantType::kQ6_K:
      return multiply_quantized<Q6K>;
    case QuantType::kQ8_0:
      return multiply_quantized<Q8_0>;
    case QuantType::kQ4_0:
      return multiply_quantized<Q4_0>;
    case QuantType::kF16:
      return multiply_float<unpack_f16, 2>;
    case QuantType::kBF16:
      return multiply_float<unpack_bf16, 2>;
    case QuantType::kF32:
      return multiply_float<unpack_f32, 4>;
    default:
      return multiply_dequantized;
  }
}

void multiply(const TileJob& job) {
  for (size_t i = 0; i < job.activation_rows * kLanes; i += kLanes) store(job.sums + i, F32{});
  const MultiplyChunk chunk = multiply_chunk(job.traits->type);
  for (uint32_t column = 0; column < job.columns; column += kChunkColumns) {
    const uint32_t left = job.columns - column;
    const uint32_t columns = left < kChunkColumns ? left : kChunkColumns;
    chunk(job, column, columns);
  }
}

// ---- Activations ----

// Plain loops over 32 values, which compilers turn into this instruction set's vectors.
void quantize_group(const float* values, ActivationGroup& group) {
  constexpr int kValues = ActivationGroup::kValues;
  // As the bits of floats, magnitudes compare like integers, and NaN is larger than all.
  int32_t bits[kValues];
  __builtin_memcpy(bits, values, sizeof bits);
  int32_t largest_bits = 0;
  for (int i = 0; i < kValues; ++i) {
    const int32_t magnitude = bits[i] & 0x7fffffff;
    largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
  }
  float largest;
  __builtin_memcpy(&largest, &largest_bits, sizeof largest);

  group = {};
  if (largest_bits >= 0x7f800000) {
    group.scale = group.sum = group.half_sums[0] = group.half_sums[1] = __builtin_nanf("");
    return;
  }
  if (largest < 0x1p-100f) return;  // its inverse would overflow
  const float inverse = 127 / largest;
  group.scale = largest / 127;

  // Adding 1.5 * 2^23 leaves the value, rounded to nearest, in the mantissa's low bits.
  constexpr float kRounder = 0x1.8p23f;
  constexpr int32_t kRounderBits = 0x4b400000;
  float shifted[kValues];
  for (int i = 0; i < kValues; ++i) shifted[i] = values[i] * inverse + kRounder;
  int32_t quants[kValues];
  __builtin_memcpy(quants, shifted, sizeof quants);
  for (int i = 0; i < kValues; ++i) quants[i] -= kRounderBits;
  for (int i = 0; i < kValues; ++i) group.quants[i] = int8_t(quants[i]);
  int32_t sums[2] = {};
  for (int i = 0; i < kValues / 2; ++i) sums[0] += quants[i];
  for (int i = kValues / 2; i < kValues; ++i) sums[1] += quants[i];
  group.half_sums[0] = group.scale * float(sums[0]);
  group.half_sums[1] = group.scale * float(sums[1]);
  group.sum = group.scale * float(sums[0] + sums[1]);
}

void quantize(const float* values, uint32_t columns, ActivationGroup* groups) {
  for (uint32_t k = 0; k < columns; k += ActivationGroup::kValues) {
    quantize_group(values + k, groups[k / ActivationGroup::kValues]);
  }
}

constexpr Kernels kKernels = {kLanes, quantize, multiply};

}  // namespace
}  // namespace nibble::cpu
