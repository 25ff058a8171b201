#include "cuda/profiler.h"

#include <algorithm>

namespace nibble::cuda {

std::vector<backend::ProfileEntry> Profiler::entries() const {
  std::vector<backend::ProfileEntry> entries;
  for (const Call& call : calls_) {
    auto entry = std::ranges::find(entries, call.kind, &backend::ProfileEntry::kind);
    if (entry == entries.end()) entry = entries.insert(entries.end(), {call.kind, 0, 0, 0, 0});
    float ms = 0;
    NIBBLE_CUDA(cudaEventElapsedTime(&ms, call.begin.handle, call.end.handle));
    entry->calls += 1;
    entry->us += 1e3 * ms;
    entry->bytes += call.bytes;
    entry->flops += call.flops;
  }
  return entries;
}

}  // namespace nibble::cuda
