#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "backend/host_kv_store.h"
#include "backend/plan.h"

namespace nibble::reference {

// One layer's keys and values of one sequence, as rows of a head at a position, in any format.
class KvRows {
 public:
  KvRows(backend::HostKvStore& store, const backend::KvSequence& sequence, backend::KvPlace place,
         const backend::Plan& plan);

  void write(uint32_t kv_head, uint32_t position, std::span<const float> key,  // [head_dim]
             std::span<const float> value);                                    // [head_dim]
  void read(uint32_t kv_head, uint32_t position, std::span<float> key,         // [head_dim]
            std::span<float> value) const;                                     // [head_dim]

 private:
  // The head behind `part_offset` (keys or values) of the position's page.
  std::byte* head(uint64_t part_offset, uint32_t kv_head, uint32_t position) const;

  backend::HostKvStore& store_;
  const std::vector<backend::PageId>& table_;
  const backend::KvLayer& layer_;
  std::span<const float> shared_key_weight_;
  uint32_t group_index_;
};

}  // namespace nibble::reference
