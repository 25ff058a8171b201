#pragma once

#include <cstddef>
#include <vector>

#include "backend/kv_store.h"
#include "cpu/aligned_array.h"

namespace nibble::cpu {

// KV pages in host memory, each taken when it is first needed.
class CpuKvStore final : public backend::KvStore {
 public:
  using KvStore::KvStore;

  void copy_page(uint32_t group, backend::PageId from, backend::PageId to) override;

  std::byte* page(uint32_t group, backend::PageId page) const {
    return pages_[group][page.value].data();
  }

 protected:
  void add_page(uint32_t group, backend::PageId page) override;

 private:
  std::vector<std::vector<AlignedArray<std::byte>>> pages_{groups().size()};  // [group][page]
};

}  // namespace nibble::cpu
