#pragma once
// F16 keys and values, brought to shared memory as the tensor cores of Hopper take them.
//
// A tile of 128 keys comes in slots of 16 KiB: keys as [128 keys, 64 dims], values as all dims of
// 16 to 128 keys, [dims / 64][keys][64 dims]; 64 dims of a key are 128 bytes, swizzled. The copy
// engine swizzles where it is told of a tensor. Pages can lie anywhere, so the tensor is all of the
// memory: 16 rows of 64 dims, by the address. Another format of pages is another class like this.

#include "cuda/attention/address_map.h"
#include "cuda/attention/heads.cuh"
#include "cuda/attention/keys.cuh"
#include "cuda/ptx_hopper.cuh"

namespace nibble::cuda {

inline constexpr uint32_t kKeysPerTile = 128;

template <int kDim>
class KvF16Tiles {
  static constexpr uint32_t kTilePages = kKeysPerTile / backend::kKvPageTokens;
  static constexpr uint32_t kBoxKeys = 16;
  static constexpr uint32_t kBoxBytes = kBoxKeys * 128;

 public:
  static constexpr uint32_t kHeadDim = kDim;
  static constexpr uint32_t kSlotBytes = 16 << 10;
  static constexpr uint32_t kSlotsPerTile = kDim / 64;
  static constexpr uint32_t kValueSlotKeys = kKeysPerTile / kSlotsPerTile;

 private:
  static constexpr uint32_t kBoxes = kSlotBytes / kBoxBytes / 2;  // of a slot, that a block brings

 public:
  // The kernel's, of all memory.
  static CUtensorMap map(const KvRows& kv) { return address_map(kBoxKeys, kv.row_bytes); }

#if NIBBLE_HAS_WGMMA
  // `offset`: of the layer's keys or values in a page. For all lanes of a warp.
  __device__ __forceinline__ KvF16Tiles(const AttentionKernelArgs& args, const CUtensorMap& map,
                                        uint64_t offset, uint32_t kv_head)
      : args_(args), map_(map), offset_(offset), kv_head_(kv_head) {}

  // Asks for the block table's entries of the tile of keys from page `first` of a sequence on.
  // Where it has none, keys of the last page stand in: numbers, but not to be counted on.
  __device__ __forceinline__ void prepare_tile(uint32_t sequence, uint32_t first, uint32_t end) {
    const uint32_t page = min(first + threadIdx.x % kLanes % kTilePages, end - 1);
    next_pages_ = page_table(args_.step, sequence)[page];
  }
  // What follows is about the tile that was prepared last.
  __device__ __forceinline__ void begin_tile() {
    pages_ = next_pages_;
  }

  // Starts this block's share of a slot, half of it, for both blocks of the cluster.
  __device__ __forceinline__ void load_keys(char* slot, uint32_t index, uint64_t* full) const {
    load(slot, full, [&](uint32_t box) { return Box{box, index}; });
  }
  __device__ __forceinline__ void load_values(char* slot, uint32_t index, uint64_t* full) const {
    constexpr uint32_t kGroups = kValueSlotKeys / kBoxKeys;
    load(slot, full, [&](uint32_t box) {
      return Box{index * kGroups + box % kGroups, box / kGroups};
    });
  }

 private:
  struct Box {
    uint32_t group, block;  // 16 keys of the tile, 64 dims
  };

  template <class BoxAt>
  __device__ __forceinline__ void load(char* slot, uint64_t* full, const BoxAt& box_at) const {
    const uint32_t lane = threadIdx.x % kLanes;
    const uint32_t index = ptx::cluster_rank() * kBoxes + lane % kBoxes;
    const Box box = box_at(index);
    const uint64_t page = __shfl_sync(kAllLanes, pages_, box.group / 2);
    if (lane >= kBoxes) return;
    const KvRow row = page_row(page, args_.layer.kv, offset_, kv_head_, box.group % 2 * kBoxKeys);
    const uint64_t address = uint64_t(row.numbers) + box.block * 128;
    const int at[] = {0, 0, int(address >> 4 & 0xfff), int(address >> 16)};
    ptx::tensor_copy(slot + index * kBoxBytes, map_, at, full, 0b11);
  }

  const AttentionKernelArgs& args_;
  const CUtensorMap& map_;
  const uint64_t offset_;
  const uint32_t kv_head_;
  uint64_t pages_, next_pages_;  // lane i: of the tile's page i % kTilePages
#endif
};

}  // namespace nibble::cuda
