#include "backend/kv_store.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/checked_math.h"
#include "base/error.h"

namespace nibble::backend {
namespace {

size_t pages_of(uint64_t positions) {
  return ceil_div(positions, uint64_t{kKvPageTokens});
}

// The page of the first position that a query at position `length` sees.
size_t first_visible_page(uint32_t window, uint32_t length) {
  return window == 0 || length < window ? 0 : (length - window + 1) / kKvPageTokens;
}

// A page that prepare() takes before it changes anything.
struct NewPage {
  uint32_t group;
  size_t index;  // in the group's table
  PageId page;
};

}  // namespace

KvStore::KvStore(std::vector<KvGroup> groups, std::vector<uint32_t> max_pages)
    : groups_(std::move(groups)) {
  NIBBLE_CHECK(groups_.size() == max_pages.size());
  for (uint32_t pages : max_pages) {
    pools_.push_back({.max_pages = pages, .references = {}, .free = {}});
  }
}

PageId KvStore::allocate(uint32_t group) {
  Pool& pool = pools_[group];
  if (pool.free.empty()) {
    const auto page = static_cast<uint32_t>(pool.references.size());
    const uint64_t page_bytes = groups_[group].page_bytes;
    if (page == pool.max_pages) {
      const uint32_t window = groups_[group].window;
      fail(ErrorCode::kOutOfMemory,
           "the KV cache is full: all {} pages of {} bytes for layers {} are taken; end a session "
           "or open the model with a larger context",
           page, page_bytes,
           window == 0 ? "without a window" : fmt::format("with a window of {}", window));
    }
    try {
      if (pool.references.capacity() == page) {
        const size_t capacity = 2 * size_t{page} + 8;
        pool.free.reserve(capacity);  // room for every page: release() must not fail
        pool.references.reserve(capacity);
      }
      add_page(group, {page});
    } catch (const std::bad_alloc&) {
      fail(ErrorCode::kOutOfMemory,
           "no memory for another KV page of {} bytes ({} bytes of KV cache are taken)", page_bytes,
           allocated_bytes());
    }
    pool.references.push_back(0);
    pool.free.push_back({page});
  }
  const PageId page = pool.free.back();
  pool.free.pop_back();
  pool.references[page.value] = 1;
  return page;
}

void KvStore::retain(uint32_t group, PageId page) {
  ++pools_[group].references[page.value];
}

void KvStore::release(uint32_t group, PageId page) {
  Pool& pool = pools_[group];
  NIBBLE_CHECK(pool.references[page.value] > 0);
  if (--pool.references[page.value] == 0) pool.free.push_back(page);
}

uint32_t KvStore::references(uint32_t group, PageId page) const {
  return pools_[group].references[page.value];
}

uint32_t KvStore::pages_in_use(uint32_t group) const {
  const Pool& pool = pools_[group];
  return static_cast<uint32_t>(pool.references.size() - pool.free.size());
}

uint64_t KvStore::allocated_bytes() const {
  uint64_t total = 0;
  for (size_t g = 0; g < groups_.size(); ++g) {
    total += pools_[g].references.size() * groups_[g].page_bytes;
  }
  return total;
}

KvSequence::KvSequence(KvStore& store) : store_(&store), tables_(store.groups().size()) {}

KvSequence::KvSequence(const KvSequence& other)
    : store_(other.store_), length_(other.length_), tables_(other.tables_) {
  for (uint32_t g = 0; g < tables_.size(); ++g) {
    for (PageId page : tables_[g]) {
      if (page != kNoPage) store_->retain(g, page);
    }
  }
}

KvSequence::KvSequence(KvSequence&& other) noexcept
    : store_(other.store_),
      length_(std::exchange(other.length_, 0)),
      tables_(std::move(other.tables_)) {}

KvSequence& KvSequence::operator=(KvSequence other) noexcept {
  std::swap(store_, other.store_);
  std::swap(length_, other.length_);
  std::swap(tables_, other.tables_);
  return *this;
}

KvSequence::~KvSequence() {
  release_all();
}

void KvSequence::release_all() {
  for (uint32_t g = 0; g < tables_.size(); ++g) {
    for (PageId page : tables_[g]) {
      if (page != kNoPage) store_->release(g, page);
    }
  }
}

void KvSequence::prepare(uint32_t tokens) {
  const size_t begin = length_ / kKvPageTokens;
  const size_t end = pages_of(uint64_t{length_} + tokens);
  std::vector<NewPage> taken;
  taken.reserve(tables_.size() * (end - begin));
  try {
    for (uint32_t g = 0; g < tables_.size(); ++g) {
      std::vector<PageId>& table = tables_[g];
      table.reserve(std::max(table.size(), end));
      for (size_t i = begin; i < end; ++i) {
        const bool present = i < table.size();
        if (present && store_->references(g, table[i]) == 1) continue;
        taken.push_back({g, i, store_->allocate(g)});
        // Pages behind the first hold nothing yet, nor does the first when it starts at length_.
        const bool holds_tokens = i == begin && length_ % kKvPageTokens != 0;
        if (present && holds_tokens) store_->copy_page(g, table[i], taken.back().page);
      }
    }
  } catch (...) {
    for (const NewPage& page : taken) store_->release(page.group, page.page);
    throw;
  }
  for (const NewPage& page : taken) {
    std::vector<PageId>& table = tables_[page.group];
    if (page.index < table.size()) {
      store_->release(page.group, table[page.index]);
      table[page.index] = page.page;
    } else {
      table.push_back(page.page);
    }
  }
}

void KvSequence::commit(uint32_t tokens) {
  length_ += tokens;
  for (uint32_t g = 0; g < tables_.size(); ++g) {
    std::vector<PageId>& table = tables_[g];
    NIBBLE_CHECK(pages_of(length_) <= table.size());
    // What a window has passed is a prefix of the table.
    size_t i = first_visible_page(store_->groups()[g].window, length_);
    for (i = std::min(i, table.size()); i > 0 && table[i - 1] != kNoPage; --i) {
      store_->release(g, std::exchange(table[i - 1], kNoPage));
    }
  }
}

bool KvSequence::can_truncate(uint32_t length) const {
  if (length > length_) return false;
  for (uint32_t g = 0; g < tables_.size(); ++g) {
    // What a window has passed is a prefix of the table: the first page tells.
    const size_t first = first_visible_page(store_->groups()[g].window, length);
    if (first < pages_of(length) && tables_[g][first] == kNoPage) return false;
  }
  return true;
}

void KvSequence::truncate(uint32_t length) {
  NIBBLE_CHECK(can_truncate(length));
  length_ = length;
  for (uint32_t g = 0; g < tables_.size(); ++g) {
    std::vector<PageId>& table = tables_[g];
    for (; table.size() > pages_of(length); table.pop_back()) {
      if (table.back() != kNoPage) store_->release(g, table.back());
    }
  }
}

}  // namespace nibble::backend
