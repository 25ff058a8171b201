#include "cpu/cpu_kv_store.h"

#include <cstring>

#include "base/error.h"

namespace nibble::cpu {

void CpuKvStore::copy_page(uint32_t group, backend::PageId from, backend::PageId to) {
  std::memcpy(page(group, to), page(group, from), groups()[group].page_bytes);
}

void CpuKvStore::add_page(uint32_t group, backend::PageId page) {
  NIBBLE_CHECK(page.value == pages_[group].size());
  pages_[group].emplace_back(groups()[group].page_bytes);
}

}  // namespace nibble::cpu
