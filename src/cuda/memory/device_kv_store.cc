#include "cuda/memory/device_kv_store.h"

#include <algorithm>
#include <new>

#include "base/error.h"

namespace nibble::cuda {
namespace {

// Or one page, if that is larger. Enough for several, as the driver rounds each up to 2 MiB.
constexpr uint64_t kSlabBytes = uint64_t{64} << 20;

}  // namespace

void DeviceKvStore::copy_page(uint32_t group, backend::PageId from, backend::PageId to) {
  NIBBLE_CUDA(cudaMemcpyAsync(reinterpret_cast<void*>(address(group, to)),
                              reinterpret_cast<const void*>(address(group, from)),
                              groups()[group].page_bytes, cudaMemcpyDeviceToDevice, stream_));
}

void DeviceKvStore::add_page(uint32_t group, backend::PageId page) {
  std::vector<uint64_t>& addresses = addresses_[group];
  if (page.value < addresses.size()) return;
  NIBBLE_CHECK(page.value == addresses.size());
  const uint64_t page_bytes = groups()[group].page_bytes;
  const uint64_t pages = std::min<uint64_t>(std::max<uint64_t>(1, kSlabBytes / page_bytes),
                                            max_pages_[group] - page.value);
  addresses.reserve(addresses.size() + pages);
  NIBBLE_CUDA(cudaSetDevice(int(device_)));  // the calling thread may have come from another one
  void* slab;
  if (cudaMalloc(&slab, pages * page_bytes) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // it is dealt with
    throw std::bad_alloc();
  }
  slabs_[group].push_back(DeviceArray<std::byte>::adopt(slab, pages * page_bytes));
  for (uint64_t i = 0; i < pages; ++i)
    addresses.push_back(reinterpret_cast<uint64_t>(slab) + i * page_bytes);
}

}  // namespace nibble::cuda
