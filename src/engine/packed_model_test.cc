#include "engine/packed_model.h"

#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>
#include <fstream>
#include <random>
#include <string>
#include <vector>

#include "base/error.h"
#include "cuda/layouts/arrangement.h"
#include "engine/engine.h"
#include "engine/pack_model.h"
#include "engine/packed_format.h"
#include "support/expect_error.h"
#include "support/fixtures.h"
#include "support/small_gemma4.h"

namespace nibble::engine {
namespace {

using packed::Header;
namespace key = packed::key;
using test::expect_error;

class TemporaryFolder {
 public:
  TemporaryFolder() { std::filesystem::create_directory(path_); }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  size_t files() const {
    return size_t(std::distance(std::filesystem::directory_iterator(path_), {}));
  }

 private:
  static inline int made_ = 0;
  std::filesystem::path path_ = std::filesystem::temp_directory_path() /
                                fmt::format("nibble_packed.{}.{}", ::getpid(), ++made_);
};

// A packed model in memory that a test can damage.
class Packed {
 public:
  explicit Packed(const std::filesystem::path& source) {
    const TemporaryFolder folder;
    pack_model(source, folder / "packed", {});
    bytes = test::read_file(folder / "packed");
  }

  PackedModel open() const { return PackedModel::from_bytes(std::as_bytes(std::span(bytes))); }

  // Where the value of a key of the model section lies; of an array its first element.
  char* value(std::string_view key, bool is_array) {
    const size_t at = bytes.find(key);
    EXPECT_NE(at, std::string::npos) << key;
    return bytes.data() + at + key.size() + (is_array ? 4 + 4 + 8 : 4 + 8);
  }
  void set_number(std::string_view key, size_t element, uint64_t number) {
    std::memcpy(value(key, true) + 8 * element, &number, sizeof number);
  }
  // All places of `from`, which is as long as `to`.
  void replace(std::string_view from, std::string_view to) {
    ASSERT_EQ(from.size(), to.size());
    for (size_t at = 0; (at = bytes.find(from, at)) != std::string::npos;)
      bytes.replace(at, to.size(), to);
  }
  // Makes the header right again, as whoever wrote such a file would.
  void seal() {
    Header* header = reinterpret_cast<Header*>(bytes.data());
    header->model_hash =
        content_hash(std::as_bytes(std::span(bytes)).subspan(sizeof(Header), header->model_bytes));
  }

  std::string bytes;
};

Packed small() {
  const TemporaryFolder folder;
  test::small_gemma4().write(folder / "small.gguf");
  return Packed(folder / "small.gguf");
}

// The tiles of a fused run, packed in one piece from the source's blocks.
std::vector<std::byte> tiles_of(const cuda::Run& run, uint32_t columns) {
  std::vector<std::byte> blocks;
  for (const backend::WeightSegment* segment : run.segments)
    blocks.insert(blocks.end(), segment->data.begin(), segment->data.end());
  std::vector<std::byte> tiles(cuda::packed_bytes(run.layout, run.rows, columns));
  cuda::visit_layout(run.layout, [&](auto layout) {
    using Layout = typename decltype(layout)::type;
    std::vector<Layout> packed(tiles.size() / sizeof(Layout));
    cuda::pack_matrix(reinterpret_cast<const typename Layout::Block*>(blocks.data()), run.rows,
                      columns, packed.data());
    std::memcpy(tiles.data(), packed.data(), tiles.size());
  });
  return tiles;
}

class EachFile : public testing::TestWithParam<std::string> {};

TEST_P(EachFile, HoldsTheSourcesTilesAndEverythingElseUnchanged) {
  const auto path = test::fixture("models/" + GetParam() + ".gguf");
  const ModelFile source = ModelFile::open(path);
  const backend::Plan source_plan = source.build_plan();
  const Packed file(path);
  const PackedModel packed = file.open();
  packed.verify({});
  packed.check_source(path, {});
  EXPECT_EQ(packed.source_name(), path.filename());

  const cuda::Arrangement arrangement(source_plan, packed::kPageBytes);
  size_t at = 0;
  for (size_t i = 0; i < arrangement.runs.size(); ++i) {
    for (const cuda::Run& run : arrangement.runs[i]) {
      ASSERT_LT(at, packed.weights().size());
      const PackedWeight& weight = packed.weights()[at++];
      EXPECT_EQ(weight.layout, cuda::layout_name(run.layout));
      EXPECT_EQ((weight.data.data() - reinterpret_cast<const std::byte*>(file.bytes.data())) %
                    ptrdiff_t(packed::kPageBytes),
                0);
      const auto expected = tiles_of(run, arrangement.distinct[i]->columns);
      ASSERT_TRUE(std::ranges::equal(weight.data, expected)) << weight.tensors[0];
    }
  }
  EXPECT_EQ(at, packed.weights().size());

  for (const gguf::Metadata& entry : source.gguf().metadata())
    EXPECT_NE(packed.model().find(entry.key), nullptr) << entry.key;
  EXPECT_TRUE(std::ranges::equal(
      source.gguf().metadata_bytes(),
      packed.model().metadata_bytes().first(source.gguf().metadata_bytes().size())));
  EXPECT_EQ(packed.model().tensors().size(), source.gguf().tensors().size());
  for (const gguf::Tensor& tensor : source.gguf().tensors()) {
    const gguf::Tensor* found = packed.model().find_tensor(tensor.name);
    ASSERT_NE(found, nullptr) << tensor.name;
    EXPECT_EQ(found->type, tensor.type);
    EXPECT_EQ(found->dimensions, tensor.dimensions);
    if (packed.tiles(tensor.name).empty()) {
      EXPECT_TRUE(std::ranges::equal(found->data, tensor.data)) << tensor.name;
    }
  }

  const backend::Plan plan = packed.build_plan();
  ASSERT_EQ(plan.weights.size(), source_plan.weights.size());
  for (size_t i = 0; i < plan.weights.size(); ++i) {
    EXPECT_EQ(plan.weights[i].columns, source_plan.weights[i].columns);
    for (size_t s = 0; s < plan.weights[i].segments.size(); ++s) {
      const backend::WeightSegment& segment = plan.weights[i].segments[s];
      EXPECT_TRUE(segment.packed);
      EXPECT_EQ(segment.name, source_plan.weights[i].segments[s].name);
      EXPECT_EQ(segment.data.data(), packed.tiles(segment.name).data());
    }
  }
}

INSTANTIATE_TEST_SUITE_P(PackedModel, EachFile,
                         testing::Values("micro-gemma4-f16", "micro-gemma4-Q4_0",
                                         "micro-gemma4-Q4_K_M", "micro-gemma4-Q5_K_M",
                                         "micro-gemma4-Q6_K", "micro-gemma4-Q8_0",
                                         "wide-gemma4-Q4_K_M"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::ranges::replace(name, '-', '_');
                           return name;
                         });

TEST(PackedModel, AnOlderLayoutVersionIsRefused) {
  Packed file = small();
  file.set_number(key::kLayoutVersions, 0, cuda::CudaF16Tiled::kVersion - 1);
  file.seal();
  expect_error(ErrorCode::kUnsupported,
               {fmt::format("layout CudaF16Tiled version {} found, this build needs version {}",
                            cuda::CudaF16Tiled::kVersion - 1, cuda::CudaF16Tiled::kVersion),
                "run nibble pack on small.gguf again"},
               [&] { file.open(); });
}

TEST(PackedModel, AnotherFormatVersionIsRefused) {
  for (const uint64_t version : {packed::kFormatVersion - 1, packed::kFormatVersion + 1}) {
    Packed file = small();
    reinterpret_cast<Header*>(file.bytes.data())->version = version;
    expect_error(ErrorCode::kUnsupported,
                 {fmt::format("format version {} found", version),
                  fmt::format("needs version {}", packed::kFormatVersion), "nibble pack"},
                 [&] { file.open(); });
  }
}

TEST(PackedModel, AnotherBackendArchitectureOrLayoutIsRefusedByName) {
  const auto with = [](std::string_view key, bool is_array, std::string_view name) {
    Packed file = small();
    name.copy(file.value(key, is_array) + (is_array ? 8 : 0), name.size());
    file.seal();
    return file;
  };
  expect_error(ErrorCode::kUnsupported, {"backend 'mtal'", "'cuda'", "small.gguf again"},
               [&] { with(key::kBackend, false, "mtal").open(); });
  expect_error(ErrorCode::kUnsupported, {"architecture sm_99", "sm_80"},
               [&] { with(key::kArchitecture, false, "sm_99").open(); });
  expect_error(ErrorCode::kUnsupported, {"layout CudaF17Tiled version 1 found"},
               [&] { with(key::kLayoutNames, true, "CudaF17Tiled").open(); });
}

TEST(PackedModel, AnotherFusionIsRefused) {
  Packed file = small();
  file.replace("blk.1.ffn_gate", "blk.1.ffn_temp");
  file.replace("blk.1.ffn_up.weight", "blk.1.ffn_up.Weight");
  file.replace("blk.1.ffn_temp", "blk.1.ffn_gate");
  file.seal();
  expect_error(ErrorCode::kMalformedFile, {"blk.1.ffn_up.weight"},
               [&] { file.open().build_plan(); });

  // The same tensors in another order.
  Packed swapped(test::fixture("models/micro-gemma4-Q4_0.gguf"));
  swapped.replace("blk.0.attn_k.weight", "blk.0.attn_x.weight");
  swapped.replace("blk.0.attn_v.weight", "blk.0.attn_k.weight");
  swapped.replace("blk.0.attn_x.weight", "blk.0.attn_v.weight");
  swapped.seal();
  expect_error(
      ErrorCode::kUnsupported,
      {"blk.0.attn_q.weight + blk.0.attn_v.weight + blk.0.attn_k.weight found, this build needs",
       "blk.0.attn_q.weight + blk.0.attn_k.weight + blk.0.attn_v.weight"},
      [&] { swapped.open().build_plan(); });
}

TEST(PackedModel, CutShortAnywhereIsRefused) {
  const Packed file = small();
  const auto bytes = std::as_bytes(std::span(file.bytes));
  for (size_t size = 0; size < bytes.size(); size += size < 200 ? 1 : 997) {
    expect_error(ErrorCode::kMalformedFile, {"(in memory)"},
                 [&] { PackedModel::from_bytes(bytes.first(size)); });
  }
  std::string longer = file.bytes + '\0';
  expect_error(ErrorCode::kMalformedFile, {std::to_string(bytes.size())},
               [&] { PackedModel::from_bytes(std::as_bytes(std::span(longer))); });
}

TEST(PackedModel, EveryBitIsWatchedOver) {
  const uint32_t seed = std::random_device{}();
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  Packed file = small();
  for (int i = 0; i < 1000; ++i) {
    // The first bytes, all of them, are the header's.
    const size_t at = size_t(i) < sizeof(Header) ? size_t(i) : random() % file.bytes.size();
    const char bit = char(1 << random() % 8);
    file.bytes[at] ^= bit;
    EXPECT_THROW(file.open().verify({}), Error) << "a flip in byte " << at;
    file.bytes[at] ^= bit;
  }
}

TEST(PackedModel, DamagedWeightsAreNamed) {
  Packed file(test::fixture("models/micro-gemma4-Q4_0.gguf"));
  const size_t place = file.open().tiles("blk.1.ffn_up.weight").data() -
                       reinterpret_cast<const std::byte*>(file.bytes.data());
  file.bytes[place] ^= 1;
  expect_error(ErrorCode::kMalformedFile, {"blk.1.ffn_gate.weight + blk.1.ffn_up.weight"},
               [&] { file.open().verify({}); });
}

TEST(PackedModel, NumbersThatLieAreRefused) {
  const Packed truthful(test::fixture("models/micro-gemma4-Q4_0.gguf"));
  const uint64_t lies[] = {0, 1, 1u << 31, uint64_t{1} << 63, UINT64_MAX};
  for (const std::string_view key :
       {key::kTensorTypes, key::kTensorRows, key::kTensorColumns, key::kWeightTensors,
        key::kWeightLayouts, key::kWeightOffsets, key::kWeightBytes}) {
    for (const uint64_t lie : lies) {
      SCOPED_TRACE(fmt::format("{}: {}", key, lie));
      Packed file = truthful;
      uint64_t truth;
      std::memcpy(&truth, file.value(key, true) + 8, sizeof truth);
      if (truth == lie) continue;
      file.set_number(key, 1, lie);
      file.seal();
      EXPECT_THROW(file.open().build_plan(), Error);
    }
  }
}

TEST(PackedModel, OtherFilesAreNoPackedModels) {
  const std::string gguf = test::read_file(test::fixture("models/micro-gemma4-Q4_0.gguf"));
  expect_error(ErrorCode::kMalformedFile, {"no packed model"},
               [&] { PackedModel::from_bytes(std::as_bytes(std::span(gguf))); });
}

TEST(PackedModel, AnotherSourceIsNamed) {
  const Packed file(test::fixture("models/micro-gemma4-Q4_0.gguf"));
  const PackedModel packed = file.open();
  expect_error(ErrorCode::kInvalidArgument,
               {"micro-gemma4-Q4_0.gguf of", std::string(packed.source_hash()), "Q8_0.gguf"},
               [&] { packed.check_source(test::fixture("models/micro-gemma4-Q8_0.gguf"), {}); });

  // As long as the right one.
  const TemporaryFolder folder;
  std::string changed = test::read_file(test::fixture("models/micro-gemma4-Q4_0.gguf"));
  changed.back() ^= 1;
  std::ofstream(folder / "changed.gguf", std::ios::binary) << changed;
  expect_error(ErrorCode::kInvalidArgument, {"changed.gguf", std::string(packed.source_hash())},
               [&] { packed.check_source(folder / "changed.gguf", {}); });
}

TEST(PackedModel, ProcessorsRefuseWhatIsPackedForGpus) {
  const TemporaryFolder folder;
  test::small_gemma4().write(folder / "small.gguf");
  pack_model(folder / "small.gguf", folder / "packed", {});
  for (const char* backend : {"cpu", "reference"}) {
    EngineOptions options;
    options.backend = backend;
    expect_error(ErrorCode::kUnsupported, {"packed", "'cuda'", backend, "small.gguf"},
                 [&] { Engine::open(folder / "packed", options); });
  }
}

TEST(PackModel, RefusesWhatCannotBePacked) {
  const TemporaryFolder folder;
  test::small_gemma4().write(folder / "small.gguf");
  pack_model(folder / "small.gguf", folder / "packed", {});
  expect_error(ErrorCode::kInvalidArgument, {"packed already", "small.gguf"},
               [&] { pack_model(folder / "packed", folder / "again", {}); });
  expect_error(ErrorCode::kInvalidArgument, {"its own source"},
               [&] { pack_model(folder / "small.gguf", folder / "small.gguf", {}); });
  expect_error(ErrorCode::kUnsupported, {"'cuda'", "'cpu'"},
               [&] { pack_model(folder / "small.gguf", folder / "again", {.backend = "cpu"}); });
  expect_error(ErrorCode::kIo, {"nowhere"},
               [&] { pack_model(folder / "small.gguf", folder / "nowhere/packed", {}); });
  test::small_gemma4().string("nibble.pack.backend", "cuda").write(folder / "forged.gguf");
  expect_error(ErrorCode::kInvalidArgument, {"nibble.pack.backend"},
               [&] { pack_model(folder / "forged.gguf", folder / "again", {}); });
  EXPECT_EQ(folder.files(), 3u);
}

TEST(PackModel, TouchesNoFileThatIsInItsWay) {
  const TemporaryFolder folder;
  test::small_gemma4().write(folder / "packed.partial");
  const std::string before = test::read_file(folder / "packed.partial");
  expect_error(ErrorCode::kIo, {"packed.partial", "there already"},
               [&] { pack_model(folder / "packed.partial", folder / "packed", {}); });
  EXPECT_EQ(test::read_file(folder / "packed.partial"), before);
  EXPECT_EQ(folder.files(), 1u);
}

TEST(PackModel, TakesSplitModelsWholeAndReplacesNoneOfTheirParts) {
  const TemporaryFolder folder;
  const auto part = [&](int i) { return folder / fmt::format("m-0000{}-of-00002.gguf", i + 1); };
  test::GgufBuilder first = test::small_gemma4(), second;
  const auto half = first.tensors.begin() + ptrdiff_t(first.tensors.size() / 2);
  const auto count = int32_t(first.tensors.size());
  second.tensors.assign(half, first.tensors.end());
  first.tensors.erase(half, first.tensors.end());
  first.u16("split.no", 0).u16("split.count", 2).i32("split.tensors.count", count).write(part(0));
  second.u16("split.no", 1).u16("split.count", 2).write(part(1));
  for (const int i : {0, 1}) {
    expect_error(ErrorCode::kInvalidArgument, {"its own source"},
                 [&] { pack_model(part(0), part(i), {}); });
  }
  for (const int i : {0, 1}) {
    pack_model(part(i), folder / "packed", {});
    const PackedModel packed = PackedModel::open(folder / "packed");
    packed.verify({});
    packed.check_source(part(1 - i), {});
    EXPECT_EQ(packed.model().tensors().size(), size_t(count));
    EXPECT_NO_THROW(packed.build_plan());
  }
}

TEST(PackModel, LeavesNothingBehindWhenTheDiskIsFull) {
  const TemporaryFolder folder;
  std::ofstream(folder / "packed") << "what was there before";
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  rlimit limit = before;
  limit.rlim_cur = 1 << 20;
  ::setrlimit(RLIMIT_FSIZE, &limit);
  expect_error(ErrorCode::kIo, {"write"}, [&] {
    pack_model(test::fixture("models/micro-gemma4-Q4_0.gguf"), folder / "packed", {});
  });
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, SIG_DFL);
  EXPECT_EQ(folder.files(), 1u);
  EXPECT_EQ(test::read_file(folder / "packed"), "what was there before");
}

TEST(PackModel, LeavesNothingBehindWhenItIsInterrupted) {
  const TemporaryFolder folder;
  const auto interrupt = [&](std::string_view what, uint64_t, uint64_t) {
    if (what != "packing") return;
    EXPECT_TRUE(std::filesystem::exists(folder / "packed.partial"));
    fail(ErrorCode::kCancelled, "Ctrl-C");
  };
  expect_error(ErrorCode::kCancelled, {"Ctrl-C"}, [&] {
    pack_model(test::fixture("models/micro-gemma4-Q4_0.gguf"), folder / "packed", {}, interrupt);
  });
  EXPECT_EQ(folder.files(), 0u);
}

TEST(PackModel, GivesTheSameFileWithAnyNumberOfThreads) {
  const TemporaryFolder folder;
  const auto source = test::fixture("models/wide-gemma4-Q4_K_M.gguf");
  pack_model(source, folder / "one", {.threads = 1});
  uint64_t last = 0, total = 0;
  pack_model(source, folder / "five", {.threads = 5},
             [&](std::string_view, uint64_t done, uint64_t of) {
               last = done;
               total = of;
             });
  EXPECT_GT(total, 0u);
  EXPECT_LE(last, total);
  EXPECT_EQ(test::read_file(folder / "one"), test::read_file(folder / "five"));
}

}  // namespace
}  // namespace nibble::engine
