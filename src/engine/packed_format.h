#pragma once
// The parts of a packed model by their names. Format: docs/formats/packed-model.md.

#include <bit>
#include <cstdint>
#include <string_view>

#include "engine/content_hash.h"

namespace nibble::engine::packed {

inline constexpr std::string_view kMagic = "NIBBLEPK";
inline constexpr uint64_t kFormatVersion = 1;
inline constexpr std::string_view kBackend = "cuda";
inline constexpr std::string_view kArchitecture = "sm_80";  // the oldest that the layouts serve
inline constexpr uint64_t kPageBytes = 4096;                // every weight begins on a page

static_assert(std::endian::native == std::endian::little, "packed models are used as they lie");

struct Header {
  char magic[8];
  uint64_t version;
  uint64_t file_bytes;
  uint64_t model_bytes;    // of the model section, which begins behind the header
  ContentHash model_hash;  // of the model section
  uint64_t reserved[2];    // zero
};
static_assert(sizeof(Header) == 64);

// Keys that the model section has beside the source's.
namespace key {
inline constexpr std::string_view kPrefix = "nibble.pack.";
inline constexpr std::string_view kBackend = "nibble.pack.backend";
inline constexpr std::string_view kArchitecture = "nibble.pack.architecture";
inline constexpr std::string_view kSourceName = "nibble.pack.source.name";
inline constexpr std::string_view kSourceBytes = "nibble.pack.source.bytes";
inline constexpr std::string_view kSourceHash = "nibble.pack.source.xxh3_128";
inline constexpr std::string_view kLayoutNames = "nibble.pack.layout.names";
inline constexpr std::string_view kLayoutVersions = "nibble.pack.layout.versions";
inline constexpr std::string_view kTensorNames = "nibble.pack.tensor.names";
inline constexpr std::string_view kTensorTypes = "nibble.pack.tensor.types";
inline constexpr std::string_view kTensorRows = "nibble.pack.tensor.rows";
inline constexpr std::string_view kTensorColumns = "nibble.pack.tensor.columns";
inline constexpr std::string_view kWeightTensors = "nibble.pack.weight.tensors";
inline constexpr std::string_view kWeightLayouts = "nibble.pack.weight.layouts";
inline constexpr std::string_view kWeightOffsets = "nibble.pack.weight.offsets";
inline constexpr std::string_view kWeightBytes = "nibble.pack.weight.bytes";
inline constexpr std::string_view kWeightHashes = "nibble.pack.weight.xxh3_128";
}  // namespace key

}  // namespace nibble::engine::packed
