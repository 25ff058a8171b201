#pragma once
// Time of each kind of kernel, by events around every launch.

#include <string>
#include <string_view>
#include <vector>

#include "backend/backend.h"
#include "cuda/handles.h"

namespace nibble::cuda {

class Profiler {
 public:
  bool on() const { return on_; }
  // Starts anew, or stops.
  void set(bool on) {
    if (on) calls_.clear();
    on_ = on;
  }

  // Calls launch(), between events when profiling is on; bytes and flops: ProfileEntry's.
  template <class Launch>
  void time(cudaStream_t stream, std::string_view kind, uint64_t bytes, double flops,
            const Launch& launch) {
    if (!on_) return launch();
    Call call{std::string(kind), bytes, flops, Event(), Event()};
    NIBBLE_CUDA(cudaEventRecord(call.begin.handle, stream));
    launch();
    NIBBLE_CUDA(cudaEventRecord(call.end.handle, stream));
    calls_.push_back(std::move(call));
  }

  // Of all finished calls, by kind, in the order in which kinds first appeared.
  std::vector<backend::ProfileEntry> entries() const;

 private:
  struct Call {
    std::string kind;
    uint64_t bytes;
    double flops;
    Event begin, end;
  };

  bool on_ = false;
  std::vector<Call> calls_;
};

}  // namespace nibble::cuda
