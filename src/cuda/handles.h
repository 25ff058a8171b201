#pragma once
// Objects of the CUDA runtime that end with their owner.

#include <cuda_runtime_api.h>

#include <cstddef>
#include <memory>
#include <utility>

#include "cuda/runtime.h"

namespace nibble::cuda {

struct Stream {
  Stream() { NIBBLE_CUDA(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(handle); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t handle = nullptr;
};

struct Event {
  explicit Event(unsigned flags = cudaEventDefault) {
    NIBBLE_CUDA(cudaEventCreateWithFlags(&handle, flags));
  }
  ~Event() {
    if (handle) cudaEventDestroy(handle);
  }
  Event(Event&& other) noexcept : handle(std::exchange(other.handle, nullptr)) {}
  Event& operator=(Event&&) = delete;
  cudaEvent_t handle = nullptr;
};

// A captured graph, ready to be launched.
struct Graph {
  explicit Graph(cudaGraph_t captured) {
    const cudaError_t error = cudaGraphInstantiate(&handle, captured, 0);
    cudaGraphDestroy(captured);
    check(error, "cudaGraphInstantiate");
  }
  ~Graph() { cudaGraphExecDestroy(handle); }
  Graph(Graph&& other) noexcept : handle(std::exchange(other.handle, nullptr)) {}
  Graph& operator=(Graph&&) = delete;
  cudaGraphExec_t handle = nullptr;
};

// Host memory that the device reads and writes without a detour.
struct FreePinned {
  void operator()(void* memory) const { cudaFreeHost(memory); }
};
template <class T>
using Pinned = std::unique_ptr<T[], FreePinned>;
// `count` elements of undefined contents.
template <class T>
Pinned<T> make_pinned(size_t count) {
  void* memory;
  NIBBLE_CUDA(cudaMallocHost(&memory, count * sizeof(T)));
  return Pinned<T>(static_cast<T*>(memory));
}

}  // namespace nibble::cuda
