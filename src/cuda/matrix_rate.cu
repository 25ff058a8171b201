// Each multiprocessor has one block of eight warps that do nothing but start products: on Hopper
// two warpgroups with two instructions of 64 x 128 x 16 in flight each, elsewhere each warp eight
// of 16 x 8 x 16. No sum waits for the one in front of it, and nothing is read from device memory.

#include "cuda/device_array.h"
#include "cuda/matrix_rate.h"
#include "cuda/ptx_hopper.cuh"
#include "cuda/timing.h"

namespace nibble::cuda {
namespace {

constexpr uint32_t kThreads = 256;
constexpr double kFlopsOfPass = 4e12;  // some milliseconds

// Two f16 numbers of either sign in [0.5, 1): zeros would take less power, and so be faster.
__device__ __forceinline__ __half2 random_halves(uint32_t index) {
  uint32_t bits = (index + 1) * 0x9e3779b9;
  bits = (bits ^ bits >> 15) * 0x85ebca6b;
  return ptx::as_half2(((bits ^ bits >> 13) & 0x83ff83ff) | 0x38003800);
}

constexpr uint32_t kColumns = 128, kSteps = 4, kTogether = 2;
constexpr double kWgmmaFlops =
    2.0 * 64 * kColumns * 16 * kSteps * kTogether;  // warpgroup and round

__global__ void __launch_bounds__(kThreads, 1) wgmma_rate_kernel(uint32_t rounds, float* never) {
#if NIBBLE_HAS_WGMMA
  __shared__ alignas(1024) __half2 right[kColumns * 64 / 2];
  for (uint32_t i = threadIdx.x; i < kColumns * 64 / 2; i += kThreads) right[i] = random_halves(i);
  ptx::publish_shared_writes();
  __syncthreads();
  __half2 left[kTogether][4];
  float sums[kTogether][kColumns / 2] = {};
  for (uint32_t i = 0; i < kTogether * 4; ++i)
    left[i / 4][i % 4] = random_halves(kThreads * i + threadIdx.x);
  const uint64_t columns = ptx::matrix_descriptor(right);
  for (uint32_t round = 0; round < rounds; ++round) {
    ptx::wgmma_fence();
#pragma unroll
    for (uint32_t step = 0; step < kSteps; ++step) {
#pragma unroll
      for (uint32_t i = 0; i < kTogether; ++i)
        ptx::wgmma<kColumns>(sums[i], left[i], columns + step * ptx::kDescriptorStep);
    }
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  float sum = 0;
  for (const auto& product : sums) {
    for (const float value : product) sum += value;
  }
  if (sum == 0.12345678f) *never = sum;  // or the compiler need not multiply at all
#endif
}

constexpr uint32_t kProducts = 8;
constexpr double kMmaFlops = 2.0 * 16 * 8 * 16 * kProducts;  // of a warp and round

__global__ void __launch_bounds__(kThreads, 1) mma_rate_kernel(uint32_t rounds, float* never) {
  __half2 left[4], right[2];
  for (uint32_t i = 0; i < 4; ++i) left[i] = random_halves(kThreads * i + threadIdx.x);
  for (uint32_t i = 0; i < 2; ++i) right[i] = random_halves(kThreads * (i + 4) + threadIdx.x);
  float sums[kProducts][4] = {};
  for (uint32_t round = 0; round < rounds; ++round) {
#pragma unroll
    for (uint32_t i = 0; i < kProducts; ++i)
      ptx::multiply_add(sums[i], left, ptx::as_bits(right[0]), ptx::as_bits(right[1]));
  }
  float sum = 0;
  for (const auto& product : sums) {
    for (const float value : product) sum += value;
  }
  if (sum == 0.12345678f) *never = sum;  // or the compiler need not multiply at all
}

}  // namespace

double measure_matrix_rate(cudaStream_t stream) {
  const uint32_t blocks = device_shape().multiprocessors;
  const bool wgmma = device_matrix_unit() == MatrixUnit::kWgmma;
  const double round_flops = blocks * (wgmma ? 2 * kWgmmaFlops : kThreads / 32 * kMmaFlops);
  const uint32_t rounds = uint32_t(kFlopsOfPass / round_flops);
  const DeviceArray<float> never(1);
  const auto kernel = wgmma ? wgmma_rate_kernel : mma_rate_kernel;
  const float ms =
      best_ms(stream, [&] { kernel<<<blocks, kThreads, 0, stream>>>(rounds, never.data()); });
  return rounds * round_flops / (ms * 1e-3);
}

}  // namespace nibble::cuda
