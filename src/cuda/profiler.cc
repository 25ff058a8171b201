#include "cuda/profiler.h"

#include <algorithm>

namespace nibble::cuda {

std::vector<backend::ProfileEntry> Profiler::entries() const {
  std::vector<backend::ProfileEntry> entries;
  for (const Call& call : calls_) {
    auto entry = std::ranges::find(entries, call.kind, &backend::ProfileEntry::kind);
    if (entry == entries.end()) entry = entries.insert(entries.end(), {call.kind, 0, 0, 0, 0});
    float ms = 0;
    NIBBLE_CUDA(cudaEventElapsedTime(&ms, call.begin, call.end));
    entry->calls += 1;
    entry->us += 1e3 * ms;
    entry->bytes += call.bytes;
    entry->flops += call.flops;
  }
  return entries;
}

cudaEvent_t Profiler::event(cudaStream_t stream) {
  cudaEvent_t event;
  NIBBLE_CUDA(cudaEventCreate(&event));
  NIBBLE_CUDA(cudaEventRecord(event, stream));
  return event;
}

void Profiler::clear() {
  for (const Call& call : calls_) {
    cudaEventDestroy(call.begin);
    cudaEventDestroy(call.end);
  }
  calls_.clear();
}

}  // namespace nibble::cuda
