#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <vector>

#include "backend/kv_store.h"

namespace nibble::reference {

// KV pages in host memory, taken as sequences grow.
class HostKvStore final : public backend::KvStore {
 public:
  using KvStore::KvStore;

  void copy_page(uint32_t group, backend::PageId from, backend::PageId to) override;

  std::span<std::byte> page(uint32_t group, backend::PageId page) {
    return {pages_[group][page.value].get(), groups()[group].page_bytes};
  }

 protected:
  void add_page(uint32_t group, backend::PageId page) override;

 private:
  using Page = std::unique_ptr<std::byte[]>;
  std::vector<std::vector<Page>> pages_{groups().size()};  // [group][page]
};

// One layer's keys and values of one sequence, as rows of a head at a position.
class KvRows {
 public:
  KvRows(HostKvStore& store, const backend::KvSequence& sequence, backend::KvPlace place,
         const backend::KvCacheShape& shape);

  void write(uint32_t kv_head, uint32_t position, std::span<const float> key,  // [head_dim]
             std::span<const float> value);                                    // [head_dim]
  void read(uint32_t kv_head, uint32_t position, std::span<float> key,         // [head_dim]
            std::span<float> value) const;                                     // [head_dim]

 private:
  // The row behind `part_offset` (keys or values) of the position's page.
  std::byte* row(uint64_t part_offset, uint32_t kv_head, uint32_t position) const;

  HostKvStore& store_;
  const std::vector<backend::PageId>& table_;
  const backend::KvGroup& group_;
  const backend::KvLayer& layer_;
  uint32_t group_index_;
  uint32_t head_dim_;
};

}  // namespace nibble::reference
