#pragma once
// KV pages in device memory.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "backend/kv_store.h"
#include "cuda/device_array.h"

namespace nibble::cuda {

// Pages lie in slabs that are taken as sessions grow and never move.
class DeviceKvStore final : public backend::KvStore {
 public:
  // Copies run in `stream`, a stream of `device`.
  DeviceKvStore(std::vector<backend::KvGroup> groups, std::vector<uint32_t> max_pages,
                uint32_t device, cudaStream_t stream)
      : KvStore(std::move(groups), max_pages),
        max_pages_(std::move(max_pages)),
        device_(device),
        stream_(stream) {}

  void copy_page(uint32_t group, backend::PageId from, backend::PageId to) override;

  // The page's address on the device.
  uint64_t address(uint32_t group, backend::PageId page) const {
    return addresses_[group][page.value];
  }

 protected:
  void add_page(uint32_t group, backend::PageId page) override;

 private:
  const std::vector<uint32_t> max_pages_;
  const uint32_t device_;
  const cudaStream_t stream_;
  std::vector<std::vector<DeviceArray<std::byte>>> slabs_{groups().size()};  // [group]
  std::vector<std::vector<uint64_t>> addresses_{groups().size()};  // [group], of whole slabs' pages
};

}  // namespace nibble::cuda
