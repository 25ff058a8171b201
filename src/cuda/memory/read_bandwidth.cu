#include <algorithm>

#include "cuda/device_array.h"
#include "cuda/memory/read_bandwidth.h"
#include "cuda/timing.h"

namespace nibble::cuda {
namespace {

constexpr uint64_t kBytes = uint64_t{2} << 30;
constexpr uint32_t kThreads = 512, kBlocksPerMultiprocessor = 4, kUnroll = 8;

// Each thread has kUnroll independent 16-byte loads in flight.
__global__ void read_kernel(const uint4* words, uint64_t count, uint32_t* never) {
  const uint64_t threads = uint64_t(gridDim.x) * kThreads;
  uint32_t sum = 0;
  for (uint64_t i = uint64_t(blockIdx.x) * kThreads + threadIdx.x;
       i + (kUnroll - 1) * threads < count; i += kUnroll * threads) {
    uint4 loaded[kUnroll];
#pragma unroll
    for (uint32_t j = 0; j < kUnroll; ++j) loaded[j] = __ldcs(words + i + j * threads);
#pragma unroll
    for (const uint4& word : loaded) sum += word.x ^ word.y ^ word.z ^ word.w;
  }
  if (sum == 0x12345678) *never = sum;  // or the compiler need not read at all
}

}  // namespace

double measure_read_bandwidth(cudaStream_t stream, std::span<const std::byte> memory) {
  const uint32_t blocks = device_shape().multiprocessors * kBlocksPerMultiprocessor;
  const uint64_t round_bytes = uint64_t(blocks) * kThreads * kUnroll * sizeof(uint4);
  DeviceArray<std::byte> buffer;
  if (memory.size() < kBytes) {
    size_t free, total;
    NIBBLE_CUDA(cudaMemGetInfo(&free, &total));
    buffer = DeviceArray<std::byte>(std::max(round_bytes, std::min<uint64_t>(kBytes, free / 2)));
    NIBBLE_CUDA(cudaMemsetAsync(buffer.data(), 1, buffer.size(), stream));
    memory = {buffer.data(), buffer.size()};
  }
  const uint64_t bytes = std::min<uint64_t>(memory.size(), kBytes) / round_bytes * round_bytes;
  const auto* const words = reinterpret_cast<const uint4*>(memory.data());
  const DeviceArray<uint32_t> never(1);
  const float ms = best_ms(stream, [&] {
    read_kernel<<<blocks, kThreads, 0, stream>>>(words, bytes / sizeof(uint4), never.data());
  });
  return double(bytes) / (ms * 1e-3);
}

}  // namespace nibble::cuda
