#pragma once
// The pages of the KV cache and the sessions' block tables.
//
// Pages are counted references, so sessions and snapshots share prefixes; a page is copied before
// it is written while somebody else refers to it. All bookkeeping is here, on the host; a backend
// adds the memory.

#include <cstdint>
#include <vector>

#include "backend/kv_format.h"
#include "base/id.h"

namespace nibble::backend {

using PageId = Id<struct PageTag>;
inline constexpr PageId kNoPage{UINT32_MAX};

class KvStore {
 public:
  // At most max_pages[g] pages of groups[g] exist at a time.
  KvStore(std::vector<KvGroup> groups, std::vector<uint32_t> max_pages);
  virtual ~KvStore() = default;
  KvStore(const KvStore&) = delete;
  KvStore& operator=(const KvStore&) = delete;

  const std::vector<KvGroup>& groups() const { return groups_; }

  // A page with one reference and undefined contents. Throws Error(kOutOfMemory) with the group's
  // numbers when all are taken or the memory for one more is refused.
  PageId allocate(uint32_t group);
  void retain(uint32_t group, PageId page);
  void release(uint32_t group, PageId page);
  uint32_t references(uint32_t group, PageId page) const;

  // Copies the contents of a page.
  virtual void copy_page(uint32_t group, PageId from, PageId to) = 0;

  uint32_t pages_in_use(uint32_t group) const;
  uint64_t allocated_bytes() const;  // memory taken for pages so far, free ones included

 protected:
  // Makes memory for page `page` of `group`, whose number is one above all earlier ones.
  virtual void add_page(uint32_t group, PageId page) = 0;

 private:
  struct Pool {
    uint32_t max_pages;
    std::vector<uint32_t> references;  // per page that has memory
    std::vector<PageId> free;
  };
  std::vector<KvGroup> groups_;
  std::vector<Pool> pools_;
};

// Block tables of one sequence of tokens: for each group, entry i is the page of positions
// [i * kKvPageTokens, (i + 1) * kKvPageTokens), or kNoPage where a window has moved past it.
// A value type: copies share pages. Must not outlive its store.
class KvSequence {
 public:
  explicit KvSequence(KvStore& store);
  KvSequence(const KvSequence& other);
  KvSequence& operator=(KvSequence other) noexcept;
  KvSequence(KvSequence&& other) noexcept;
  ~KvSequence();

  uint32_t length() const { return length_; }  // positions whose keys and values are stored
  const std::vector<PageId>& table(uint32_t group) const { return tables_[group]; }

  // Makes [length, length + tokens) writable in every group: adds pages, copies a shared last one.
  // Leaves the sequence as it was when it throws: Error(kOutOfMemory) where there are no pages,
  // std::bad_alloc, or what copy_page() throws.
  void prepare(uint32_t tokens);
  // The `tokens` prepared positions now hold keys and values; lets go of pages that no window
  // can see any more.
  void commit(uint32_t tokens);
  // Whether the first `length` positions are complete enough to go on from: every windowed group
  // still has the pages of [length - window + 1, length).
  bool can_truncate(uint32_t length) const;
  // Forgets all positions from `length` on; can_truncate(length) must hold.
  void truncate(uint32_t length);

 private:
  void release_all();

  KvStore* store_;
  uint32_t length_ = 0;
  std::vector<std::vector<PageId>> tables_;  // [group][position / kKvPageTokens]
};

}  // namespace nibble::backend
