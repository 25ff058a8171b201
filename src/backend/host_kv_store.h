#pragma once

#include <cstddef>
#include <vector>

#include "backend/kv_store.h"
#include "base/aligned_array.h"

namespace nibble::backend {

// KV pages in host memory, each taken when it is first needed.
class HostKvStore final : public KvStore {
 public:
  using KvStore::KvStore;

  void copy_page(uint32_t group, PageId from, PageId to) override;

  std::byte* page(uint32_t group, PageId page) const { return pages_[group][page.value].data(); }

 protected:
  void add_page(uint32_t group, PageId page) override;

 private:
  std::vector<std::vector<AlignedArray<std::byte>>> pages_{groups().size()};  // [group][page]
};

}  // namespace nibble::backend
