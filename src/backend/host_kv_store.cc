#include "backend/host_kv_store.h"

#include <cstring>

#include "base/error.h"

namespace nibble::backend {

void HostKvStore::copy_page(uint32_t group, PageId from, PageId to) {
  std::memcpy(page(group, to), page(group, from), groups()[group].page_bytes);
}

void HostKvStore::add_page(uint32_t group, PageId page) {
  NIBBLE_CHECK(page.value == pages_[group].size());
  pages_[group].emplace_back(groups()[group].page_bytes);
}

}  // namespace nibble::backend
