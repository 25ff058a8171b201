#pragma once
// Hopper's own instructions (sm_90a): asynchronous matrix products of a warpgroup, and what a
// kernel of producer and consumer warps needs around them.

#include <cuda.h>
#include <cuda_fp16.h>

#include "cuda/ptx.cuh"

// Set where the code of a kernel may use them.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define NIBBLE_HAS_WGMMA 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "Hopper code is built for sm_90a: plain sm_90 lacks wgmma"
#endif

namespace nibble::cuda::ptx {

#if NIBBLE_HAS_WGMMA
// Registers per thread, for a whole warpgroup: a producer gives up what consumers take.
template <int kRegisters>
__device__ __forceinline__ void give_up_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier))
               : "memory");
}
// At the barrier of block `rank` of the cluster that lies where this block's `barrier` does. Of
// what this thread wrote, the other block need not see anything (a release to the whole cluster
// would wait for all of the thread's memory operations).
__device__ __forceinline__ void barrier_arrive_at(uint64_t* barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of the cluster have come here.
__device__ __forceinline__ void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}
// What this thread has written to shared memory, the tensor cores and the copy engine see once
// they hear of it.
__device__ __forceinline__ void publish_shared_writes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Four 8 x 8 matrices of 16-bit values, as ldmatrix takes them; lanes 8i to 8i + 7 give the
// addresses of the i-th one's rows.
__device__ __forceinline__ void store_matrices(uint32_t address, const uint32_t (&from)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
}

// The copy engine brings the box that `map` describes, from `coordinates`, to the same place in
// the shared memory of all blocks of the cluster that `blocks` has a bit of, and reports to the
// `barrier` of each.
__device__ __forceinline__ void tensor_copy(void* to, const CUtensorMap& map,
                                            const int (&coordinates)[4], uint64_t* barrier,
                                            uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(shared_address(to)),
      "l"(&map), "r"(coordinates[0]), "r"(coordinates[1]), "r"(coordinates[2]), "r"(coordinates[3]),
      "r"(shared_address(barrier)), "h"(blocks)
      : "memory");
}

// A flag in global memory: what a thread wrote before storing it, others see after loading it.
__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}
// An operand of a product, in shared memory: rows of 64 f16 (128 bytes), each of whose eight
// 16-byte chunks c stands at c ^ (row % 8). `first` lies at a multiple of 1024 bytes; the operand
// is 16 columns wide and starts at column 16 * step. A transposed operand is 16 rows high instead,
// and has its next 64 columns `next_columns` bytes behind.
__device__ __forceinline__ uint64_t matrix_descriptor(const void* first,
                                                      uint32_t next_columns = 16) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kBetweenEightRows = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kBetweenEightRows | uint64_t{next_columns / 16} << 16 |
         (shared_address(first) & 0x3ffff) >> 4;
}
inline constexpr uint64_t kDescriptorStep = 32 / 16;  // to the next 16 columns
// Registers written before are visible to the products started after.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Ends a group of products.
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Returns when all groups but the last kPending are done.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// clang-format off
#define NIBBLE_SUMS(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define NIBBLE_LEFT_RIGHT "r"(as_bits(a[0])), "r"(as_bits(a[1])), "r"(as_bits(a[2])), "r"(as_bits(a[3])), "l"(b)
// Starts sums [64 rows, kColumns] += a [64, 16] * b [kColumns, 16]^T; with kTransposed, b is
// [16, kColumns]. Warp w of the warpgroup holds rows [16 w, 16 w + 16) of a and of the sums, as
// multiply_add() does, 8 columns after the other. Until wgmma_wait() neither `sums` nor `a` may be
// touched.
template <int kColumns, bool kTransposed = false>
__device__ __forceinline__ void wgmma(float (&sums)[kColumns / 2], const __half2 (&a)[4], uint64_t b) {
  static_assert(kColumns == 32 || kColumns == 64 || kColumns == 128);
  if constexpr (kColumns == 32) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15}, "
        "{%16,%17,%18,%19}, %20, 1, 1, 1, %21;"
        : NIBBLE_SUMS(0), NIBBLE_SUMS(8) : NIBBLE_LEFT_RIGHT, "n"(int(kTransposed)));
  } else if constexpr (kColumns == 64) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        " %16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "{%32,%33,%34,%35}, %36, 1, 1, 1, %37;"
        : NIBBLE_SUMS(0), NIBBLE_SUMS(8), NIBBLE_SUMS(16), NIBBLE_SUMS(24) : NIBBLE_LEFT_RIGHT, "n"(int(kTransposed)));
  } else {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        " %16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        " %32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        " %48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "{%64,%65,%66,%67}, %68, 1, 1, 1, %69;"
        : NIBBLE_SUMS(0), NIBBLE_SUMS(8), NIBBLE_SUMS(16), NIBBLE_SUMS(24), NIBBLE_SUMS(32), NIBBLE_SUMS(40), NIBBLE_SUMS(48), NIBBLE_SUMS(56) : NIBBLE_LEFT_RIGHT, "n"(int(kTransposed)));
  }
}
// The same with a [64, 16] in shared memory, too; without `add`, the sums start from zero.
template <int kColumns, bool kTransposed>
__device__ __forceinline__ void wgmma_shared(float (&sums)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  static_assert(kColumns == 64 || kColumns == 128);
  if constexpr (kColumns == 64) {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        " %16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, "
        "%32, %33, add, 1, 1, 0, %35;\n}"
        : NIBBLE_SUMS(0), NIBBLE_SUMS(8), NIBBLE_SUMS(16), NIBBLE_SUMS(24) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposed)));
  } else {
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
        "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        " %16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
        " %32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
        " %48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
        "%64, %65, add, 1, 1, 0, %67;\n}"
        : NIBBLE_SUMS(0), NIBBLE_SUMS(8), NIBBLE_SUMS(16), NIBBLE_SUMS(24), NIBBLE_SUMS(32), NIBBLE_SUMS(40), NIBBLE_SUMS(48), NIBBLE_SUMS(56) : "l"(a), "l"(b), "r"(int(add)), "n"(int(kTransposed)));
  }
}
#undef NIBBLE_SUMS
#undef NIBBLE_LEFT_RIGHT
// clang-format on
#endif

}  // namespace nibble::cuda::ptx
