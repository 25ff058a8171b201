#include "engine/memory.h"

#include <algorithm>
#include <limits>
#include <string>

#include "base/checked_math.h"
#include "base/error.h"
#include "engine/engine.h"

namespace nibble::engine {
namespace {

using backend::KvGroup;
using backend::KvOptions;
using backend::Plan;

constexpr uint64_t kUnbounded = std::numeric_limits<uint64_t>::max();

// The most pages that one session and its snapshots refer to at any time.
uint64_t session_pages(const KvGroup& group, const SizeRequest& request) {
  // An unbounded group's snapshot shares all pages with its session but the one that the session
  // has written on since; a window's may share none.
  const uint64_t snapshot = group.window == 0 ? 1 : group.pages_for(request.context, 0);
  return group.pages_for(request.context, request.ubatch) + request.snapshots * snapshot;
}

uint64_t workspace_bytes(const Plan& plan, uint32_t ubatch) {
  uint64_t width = 0;  // floats per token: every activation, and the widest weight's rows
  for (const backend::Value& value : plan.values) width += value.width;
  uint64_t scratch = 0;
  for (const backend::Step& step : plan.steps) {
    if (const auto* qkv = std::get_if<backend::NormQkvStep>(&step)) {
      scratch = std::max<uint64_t>(scratch, plan.weight(qkv->qkv).rows());
    } else if (const auto* mlp = std::get_if<backend::GatedMlpStep>(&step)) {
      scratch = std::max<uint64_t>(
          scratch, uint64_t{plan.weight(mlp->gate_up).rows()} + plan.weight(mlp->down).columns);
    }
  }
  width += scratch + plan.hidden;
  return (width * ubatch + plan.vocabulary) * sizeof(float);
}

uint64_t bytes_for(const Plan& plan, SizeRequest request, uint32_t context, uint32_t snapshots) {
  request.context = context;
  request.snapshots = snapshots;
  return needs_of(plan, request).total();
}

// 0 when not even one token fits.
uint32_t largest_context(const Plan& plan, SizeRequest request, uint64_t free_bytes) {
  // A sixteenth stays free for the tokenizer, the program itself and the neighbours.
  const uint64_t usable = free_bytes - free_bytes / 16;
  uint32_t low = 0;  // fits, if only as nothing at all
  uint32_t high = plan.trained_context;
  while (low < high) {
    const uint32_t middle = high - (high - low) / 2;
    if (bytes_for(plan, request, middle, request.snapshots) <= usable) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  if (low > 0 || request.snapshots == 0) return low;
  request.snapshots = 0;
  return largest_context(plan, request, free_bytes);
}

std::string in_words(uint64_t bytes) {
  return fmt::format("{} bytes ({:.2f} GiB)", bytes, static_cast<double>(bytes) / (1 << 30));
}

// "; what would fit: ..." for an error message.
std::string what_would_fit(const Plan& plan, SizeRequest request, uint64_t free_bytes) {
  std::string list;
  for (const KvOptions& kv : request.alternatives) {
    request.kv = kv;
    const uint32_t context = largest_context(plan, request, free_bytes);
    if (context == 0) continue;
    list += fmt::format("{}-c {} --kv {}", list.empty() ? "" : ", ", context, to_string(kv.format));
  }
  if (list.empty()) return "not even one token of context would fit: take a smaller model";
  return "what would fit: " + list;
}

}  // namespace

MemoryNeeds needs_of(const Plan& plan, const SizeRequest& request) {
  uint64_t session_bytes = 0;
  for (const KvGroup& group : make_kv_groups(plan, request.kv)) {
    session_bytes += session_pages(group, request) * group.page_bytes;
  }
  return {.weights_bytes = plan.weight_bytes(),
          .kv_bytes = checked_mul(session_bytes, uint64_t{request.sessions}).value_or(kUnbounded),
          .workspace_bytes = workspace_bytes(plan, request.ubatch),
          .driver_bytes = 0};
}

uint64_t MemoryNeeds::total() const {
  const uint64_t fixed = weights_bytes + workspace_bytes + driver_bytes;
  return checked_add(fixed, kv_bytes).value_or(kUnbounded);
}

Size fit(const Plan& plan, SizeRequest request, uint64_t free_bytes) {
  if (request.context == 0) request.context = largest_context(plan, request, free_bytes);
  const bool any = request.context != 0;
  request.context = std::max(request.context, 1u);
  const uint64_t needed = bytes_for(plan, request, request.context, 0);
  if (!any || needed > free_bytes) {
    fail(ErrorCode::kOutOfMemory,
         "{} of weights and {} session(s) of {} tokens (KV cache: {}) need {} of memory, {} are "
         "free; {}{}",
         in_words(plan.weight_bytes()), request.sessions, request.context,
         describe_kv(make_kv_groups(plan, request.kv)), in_words(needed), in_words(free_bytes),
         what_would_fit(plan, request, free_bytes), request.advice);
  }
  while (bytes_for(plan, request, request.context, request.snapshots) > free_bytes) {
    --request.snapshots;
  }
  Size size{.context = request.context, .snapshots = request.snapshots, .max_kv_pages = {}};
  for (const KvGroup& group : make_kv_groups(plan, request.kv)) {
    const uint64_t pages = session_pages(group, request) * request.sessions;
    size.max_kv_pages.push_back(
        static_cast<uint32_t>(std::min<uint64_t>(pages, std::numeric_limits<uint32_t>::max())));
  }
  return size;
}

}  // namespace nibble::engine
