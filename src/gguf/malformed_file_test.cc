// What a wrong file gives: an Error that says where and why, never a crash, a hang, a read outside
// the file or an allocation that the file does not justify.
#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <random>

#include "base/error.h"
#include "gguf/gguf_file.h"
#include "support/expect_error.h"
#include "support/gguf_builder.h"

namespace nibble::gguf {
namespace {

using quant::QuantType;
using test::gguf_string;
using test::gguf_u32;
using test::gguf_u64;
using test::GgufBuilder;

constexpr uint64_t kHuge = std::numeric_limits<uint64_t>::max();

std::vector<std::byte> bytes_of(std::string_view text) {
  const auto bytes = std::as_bytes(std::span(text));
  return {bytes.begin(), bytes.end()};
}

void expect_refused(const std::vector<std::byte>& bytes, const std::vector<std::string>& parts,
                    ErrorCode code = ErrorCode::kMalformedFile) {
  test::expect_error(code, parts, [&] { GgufFile::from_bytes(bytes); });
}
void expect_refused(const GgufBuilder& builder, const std::vector<std::string>& parts,
                    ErrorCode code = ErrorCode::kMalformedFile) {
  expect_refused(builder.build(), parts, code);
}

GgufBuilder one_tensor(std::vector<uint64_t> dimensions, QuantType type = QuantType::kF32) {
  GgufBuilder builder;
  builder.tensors.push_back({"w", uint32_t(type), std::move(dimensions), std::vector<std::byte>(64),
                             std::nullopt, std::nullopt});
  return builder;
}

// A bit of everything; its last tensor ends exactly where the file does.
GgufBuilder small_file() {
  GgufBuilder builder;
  builder.u8("u8", 1).i16("i16", -2).u32("general.alignment", 32).u64("u64", 4).f32("f32", 5);
  builder.f64("f64", 6).boolean("bool", true).string("string", "seven");
  builder.u16_array("u16s", {8, 9}).bool_array("bools", {true, false});
  builder.string_array("strings", {"ten", ""});
  builder.f32_tensor("a", {2, 2}, {1, 2, 3, 4});
  builder.tensor("b", QuantType::kQ8_0, {32}).tensor("c", QuantType::kF16, {3, 1, 2, 1});
  return builder;
}

// Reads everything that a file that opened promises to hold.
void read_all(const GgufFile& file) {
  unsigned sum = 0;
  for (const Tensor& tensor : file.tensors()) {
    for (const std::byte byte : tensor.data) sum += unsigned(byte);
    ASSERT_EQ(file.find_tensor(tensor.name), &tensor);
  }
  for (const Metadata& metadata : file.metadata()) {
    ASSERT_EQ(file.find(metadata.key), &metadata);
    if (metadata.type != ValueType::kArray) continue;
    const Array& array = std::get<Array>(metadata.value);
    sum += unsigned(array.data.size());
    if (array.element_type != ValueType::kString) continue;
    const auto strings = file.find_string_array(metadata.key);
    ASSERT_EQ(strings->size(), array.count);
    for (const std::string_view text : *strings) {
      for (const char c : text) sum += unsigned(c);
    }
  }
  volatile unsigned sink = sum;
  (void)sink;
}

TEST(MalformedGguf, EmptyAndForeignFiles) {
  expect_refused(bytes_of(""), {"empty"});
  expect_refused(bytes_of("GGU"), {"byte 0", "4 bytes expected, 3 left"});
  expect_refused(bytes_of("PK\x03\x04 and the rest"), {"byte 0", R"('PK\x03\x04')", "no GGUF"});
}

TEST(MalformedGguf, VersionsAndByteOrder) {
  for (const uint32_t version : {0u, 1u, 4u, 0xffffffffu}) {
    GgufBuilder builder;
    builder.version = version;
    expect_refused(builder, {"byte 4", "version " + std::to_string(version), "2 or 3"},
                   ErrorCode::kUnsupported);
  }
  for (const uint32_t version : {1u, 2u, 3u}) {
    GgufBuilder builder;
    builder.version = version << 24;
    expect_refused(builder, {"big-endian", "version " + std::to_string(version)},
                   ErrorCode::kUnsupported);
  }
}

TEST(MalformedGguf, TruncatedAtEveryByte) {
  const auto whole = small_file().build();
  ASSERT_NO_THROW(GgufFile::from_bytes(whole));
  for (size_t length = 0; length < whole.size(); ++length) {
    // A copy of its own, so that the sanitizers see a read past the end.
    const std::vector<std::byte> cut(whole.begin(), whole.begin() + ptrdiff_t(length));
    EXPECT_THROW(GgufFile::from_bytes(cut), Error) << "cut to " << length << " bytes";
  }
}

TEST(MalformedGguf, AnyByteChanged) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  const auto whole = small_file().build();
  for (size_t at = 0; at < whole.size(); ++at) {
    for (const unsigned value :
         {0u, 1u, 0x7fu, 0x80u, 0xffu, unsigned(whole[at]) + 1, unsigned(random() & 0xff)}) {
      auto changed = whole;
      changed[at] = std::byte(value);
      try {
        read_all(GgufFile::from_bytes(changed));
      } catch (const Error&) {
      }
    }
  }
}

TEST(MalformedGguf, CountsLargerThanTheFileCouldHold) {
  for (const uint64_t count :
       {uint64_t(2), uint64_t(1) << 32, uint64_t(1) << 60, kHuge / 14, kHuge / 14 + 1, kHuge}) {
    SCOPED_TRACE(count);
    GgufBuilder keys = small_file();
    keys.metadata_count = count + 11;  // it has 11
    if (count <= kHuge - 11) expect_refused(keys, {"byte"});
    GgufBuilder tensors = small_file();
    tensors.tensor_count = count + 3;
    if (count <= kHuge - 3) expect_refused(tensors, {"byte"});
  }
  GgufBuilder builder;
  builder.metadata_count = kHuge;
  expect_refused(builder, {"byte 24", std::to_string(kHuge) + " keys", "only 0 bytes left"});
  builder.metadata_count = std::nullopt;
  builder.tensor_count = kHuge;
  expect_refused(builder, {"byte 24", std::to_string(kHuge) + " tensors", "only 0 bytes left"});
}

TEST(MalformedGguf, LengthsLargerThanTheFileCouldHold) {
  for (const uint64_t length : {uint64_t(4), uint64_t(1) << 40, kHuge - 7, kHuge}) {
    SCOPED_TRACE(length);
    const std::string bytes = gguf_u64(length) + "abc";
    expect_refused(GgufBuilder().raw("k", 8, bytes), {"'k'", std::to_string(length)});
    // Arrays: of numbers, bools, strings; also where count times size wraps.
    for (const uint32_t type : {0u, 4u, 7u, 8u, 10u}) {
      for (const uint64_t count : {length, kHuge / 8 + 1, kHuge / 4 + 1}) {
        const std::string array = gguf_u32(type) + gguf_u64(count) + std::string(3, '\1');
        expect_refused(GgufBuilder().raw("k", 9, array), {"'k'", std::to_string(count)});
      }
    }
  }
  expect_refused(GgufBuilder().raw("k", 9, gguf_u32(8) + gguf_u64(1) + gguf_string("x").substr(1)),
                 {"'k'"});
  GgufBuilder name;
  name.metadata_count = 1;
  auto file = name.build();
  for (const std::byte byte : bytes_of(gguf_u64(kHuge) + "a key of endless length")) {
    file.push_back(byte);
  }
  expect_refused(file, {"a key", std::to_string(kHuge)});
}

TEST(MalformedGguf, NamesMustBeThereAndOfSaneLength) {
  expect_refused(GgufBuilder().u32("", 1), {"byte 24", "a key has 0 bytes", "65535"});
  expect_refused(GgufBuilder().u32(std::string(65536, 'k'), 1), {"a key has 65536 bytes"});
  EXPECT_NO_THROW(GgufFile::from_bytes(GgufBuilder().u32(std::string(65535, 'k'), 1).build()));
  expect_refused(GgufBuilder().f32_tensor("", {1}, {1}), {"name has 0 bytes"});
  expect_refused(GgufBuilder().f32_tensor(std::string(65536, 't'), {1}, {1}),
                 {"name has 65536 bytes"});
}

TEST(MalformedGguf, KeysAndTensorsOccurOnce) {
  expect_refused(GgufBuilder().u32("a", 1).u32("b", 2).u32("a", 3), {"byte 66", "'a'", "twice"});
  expect_refused(GgufBuilder().f32_tensor("t", {1}, {1}).f32_tensor("t", {1}, {1}),
                 {"'t'", "twice"});
}

TEST(MalformedGguf, ValueTypesAndBools) {
  expect_refused(GgufBuilder().raw("k", 13, "abcdefgh"), {"'k'", "value type 13", "0 to 12"});
  expect_refused(GgufBuilder().raw("k", 0xffffffff, "abcdefgh"), {"value type 4294967295"});
  expect_refused(GgufBuilder().raw("k", 9, gguf_u32(13) + gguf_u64(1) + "abcdefgh"),
                 {"'k'", "value type 13"});
  const std::string inner = gguf_u32(0) + gguf_u64(1) + "x";
  expect_refused(GgufBuilder().raw("k", 9, gguf_u32(9) + gguf_u64(1) + inner),
                 {"'k'", "array of arrays"}, ErrorCode::kUnsupported);
  expect_refused(GgufBuilder().raw("k", 7, "\x02"), {"byte 37", "'k'", "a bool of 2", "0 or 1"});
  expect_refused(GgufBuilder().raw("k", 9, gguf_u32(7) + gguf_u64(2) + "\x01\xff"),
                 {"byte 50", "'k'", "a bool of 255"});
}

TEST(MalformedGguf, Alignments) {
  for (const uint32_t alignment : {0u, 1u, 4u, 12u, 33u, 1u << 21, 1u << 31, 0xffffffffu}) {
    SCOPED_TRACE(alignment);
    expect_refused(GgufBuilder().u32("general.alignment", alignment).f32_tensor("t", {1}, {1}),
                   {"'general.alignment' is " + std::to_string(alignment), "power of two"});
  }
  expect_refused(
      GgufBuilder().u64("general.alignment", uint64_t(1) << 63).f32_tensor("t", {1}, {1}),
      {"power of two"});
  expect_refused(GgufBuilder().string("general.alignment", "32"), {"'32' (string)", "integer"});
}

TEST(MalformedGguf, Dimensions) {
  expect_refused(one_tensor({}), {"'w'", "0 dimensions", "1 to 4"});
  expect_refused(one_tensor({1, 1, 1, 1, 1}), {"'w'", "5 dimensions", "1 to 4"});
  GgufBuilder endless = one_tensor({1});
  endless.tensors[0].dimension_count = 0xffffffff;
  expect_refused(endless, {"4294967295 dimensions"});
  for (size_t zero = 0; zero < 4; ++zero) {
    std::vector<uint64_t> dimensions = {2, 2, 2, 2};
    dimensions[zero] = 0;
    expect_refused(one_tensor(dimensions), {"'w'", "dimension of 0"});
  }
  // A dimension of zero must not hide a product that wraps.
  expect_refused(one_tensor({uint64_t(1) << 62, uint64_t(1) << 62, 0}), {"dimension of 0"});
  expect_refused(one_tensor({255}, QuantType::kQ4_K), {"'w'", "255", "256", "Q4_K"});
  expect_refused(one_tensor({16, 2}, QuantType::kQ8_0), {"'w'", "16", "32", "Q8_0"});
}

TEST(MalformedGguf, SizesThatWrap) {
  const uint64_t k32 = uint64_t(1) << 32;
  for (const std::vector<uint64_t>& dimensions : {std::vector<uint64_t>{k32, k32},
                                                  {k32, k32, k32, k32},
                                                  {kHuge},
                                                  {kHuge, kHuge},
                                                  {uint64_t(1) << 62},
                                                  {uint64_t(1) << 31, k32},
                                                  {k32 + 1, k32 - 1}}) {
    expect_refused(one_tensor(dimensions), {"'w'", "larger than any file"});
  }
  // Few bytes a value: the product stays below 2^64, the size does not fit the file.
  expect_refused(one_tensor({uint64_t(1) << 62, 2}, QuantType::kQ4_0), {"'w'", "cut short"});
}

TEST(MalformedGguf, OffsetsOutsideTheFile) {
  for (const uint64_t offset :
       {uint64_t(32), uint64_t(1) << 40, kHuge - 31, kHuge - 63, kHuge - 95, (kHuge >> 1) + 1}) {
    SCOPED_TRACE(offset);
    GgufBuilder builder = one_tensor({16});  // 64 bytes, the whole data section
    builder.tensors[0].offset = offset / 32 * 32;
    expect_refused(builder,
                   {"'w'", "64 bytes at offset " + std::to_string(offset / 32 * 32), "cut short"});
  }
  GgufBuilder longer = one_tensor({17});
  expect_refused(longer, {"'w'", "68 bytes at offset 0"});
  // The sum of sizes wraps, each alone is past the end.
  GgufBuilder many;
  for (const char* name : {"a", "b", "c", "d"}) {
    many.tensors.push_back({name, 0, {uint64_t(1) << 60}, {}, std::nullopt, std::nullopt});
  }
  expect_refused(many, {"'a'", "cut short"});
}

TEST(MalformedGguf, OffsetsMustBeAligned) {
  for (const uint64_t offset : {1, 8, 31, 33}) {
    GgufBuilder builder = one_tensor({4});
    builder.tensors[0].offset = offset;
    expect_refused(builder, {"'w'", "offset " + std::to_string(offset), "alignment 32"});
  }
}

TEST(MalformedGguf, TensorsMayNotOverlap) {
  GgufBuilder same;
  same.f32_tensor("a", {4}, {1, 2, 3, 4}).f32_tensor("b", {4}, {1, 2, 3, 4});
  same.tensors[1].offset = 0;
  expect_refused(same, {"'a'", "'b'", "overlap"});

  GgufBuilder reach;  // b begins in the middle of a, and c lies between
  reach.f32_tensor("a", {64}, std::vector<float>(64)).f32_tensor("c", {4}, {1, 2, 3, 4});
  reach.f32_tensor("b", {4}, {1, 2, 3, 4});
  reach.tensors[2].offset = 128;
  expect_refused(reach, {"'a'", "'b'", "overlap"});
}

TEST(MalformedGguf, ManyTensorsAreCheckedInGoodTime) {
  GgufBuilder builder;  // quadratic work would take minutes
  for (int i = 0; i < 100000; ++i) {
    builder.f32_tensor(std::to_string(i), {1}, {1});
  }
  EXPECT_NO_THROW(GgufFile::from_bytes(builder.build()));
  builder.tensors[7].offset = 99999 * 32;
  expect_refused(builder, {"overlap"});
}

TEST(MalformedGguf, AnUnknownTensorTypeIsNamed) {
  for (const uint32_t type : {4u, 5u, 16u, 31u, 40u, 0x80000000u, 0xffffffffu}) {
    GgufBuilder builder = one_tensor({256});
    builder.tensors[0].type = type;
    expect_refused(builder, {"'w'", "type " + std::to_string(type), "Q4_K (12)"},
                   ErrorCode::kUnsupported);
  }
}

}  // namespace
}  // namespace nibble::gguf
