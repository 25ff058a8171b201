#pragma once
// Medians of what work takes on the device.

#include <algorithm>
#include <vector>

#include "cuda/handles.h"
#include "cuda/timing.h"

namespace nibble::bench {

// Median microseconds that what start() starts takes, of `times` times after two to warm up.
template <class Start>
double time_us(cudaStream_t stream, int times, const Start& start) {
  std::vector<float> all_ms;
  for (int i = -2; i < times; ++i) {
    const float ms = cuda::time_ms(stream, start);
    if (i >= 0) all_ms.push_back(ms);
  }
  std::ranges::sort(all_ms);
  return all_ms[all_ms.size() / 2] * 1e3;
}

// The same of a graph of what record(stream) starts.
template <class Record>
double time_graph_us(const Record& record) {
  const cuda::Stream stream;
  NIBBLE_CUDA(cudaStreamBeginCapture(stream.handle, cudaStreamCaptureModeThreadLocal));
  record(stream.handle);
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  NIBBLE_CUDA(cudaStreamEndCapture(stream.handle, &graph));
  NIBBLE_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  const double us =
      time_us(stream.handle, 11, [&] { NIBBLE_CUDA(cudaGraphLaunch(executable, stream.handle)); });
  NIBBLE_CUDA(cudaGraphExecDestroy(executable));
  NIBBLE_CUDA(cudaGraphDestroy(graph));
  return us;
}

}  // namespace nibble::bench
