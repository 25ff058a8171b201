// What a right file gives: values, arrays, tensors, splits, the real models.
#include "gguf/gguf_file.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <random>

#include "base/error.h"
#include "support/expect_error.h"
#include "support/fixtures.h"
#include "support/gguf_builder.h"

namespace nibble::gguf {
namespace {

using quant::QuantType;
using test::expect_error;
using test::GgufBuilder;
using ::testing::TempDir;

std::vector<float> floats(std::span<const std::byte> data) {
  std::vector<float> values(data.size() / sizeof(float));
  std::memcpy(values.data(), data.data(), data.size());
  return values;
}

TEST(GgufFile, ReadsEveryScalarType) {
  const auto bytes = GgufBuilder()
                         .u8("u8", 255)
                         .i8("i8", -128)
                         .u16("u16", 65535)
                         .i16("i16", -32768)
                         .u32("u32", 4294967295u)
                         .i32("i32", std::numeric_limits<int32_t>::min())
                         .u64("u64", std::numeric_limits<uint64_t>::max())
                         .i64("i64", std::numeric_limits<int64_t>::min())
                         .i64("positive", 7)
                         .f32("f32", 0.1f)
                         .f64("f64", 0.1)
                         .boolean("yes", true)
                         .boolean("no", false)
                         .string("text", "Grüße")
                         .string("empty", "")
                         .build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  EXPECT_EQ(file.metadata().size(), 15u);
  EXPECT_EQ(file.find_uint("u8"), 255u);
  EXPECT_EQ(file.find_uint("u16"), 65535u);
  EXPECT_EQ(file.find_uint("u32"), 4294967295u);
  EXPECT_EQ(file.find_uint("u64"), std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(file.find_uint("positive"), 7u);
  EXPECT_EQ(std::get<int64_t>(file.find("i8")->value), -128);
  EXPECT_EQ(std::get<int64_t>(file.find("i16")->value), -32768);
  EXPECT_EQ(std::get<int64_t>(file.find("i32")->value), std::numeric_limits<int32_t>::min());
  EXPECT_EQ(std::get<int64_t>(file.find("i64")->value), std::numeric_limits<int64_t>::min());
  EXPECT_EQ(file.find("i64")->type, ValueType::kInt64);
  EXPECT_EQ(file.find_float("f32"), double(0.1f));
  EXPECT_EQ(file.find_float("f64"), 0.1);
  EXPECT_EQ(file.find_bool("yes"), true);
  EXPECT_EQ(file.find_bool("no"), false);
  EXPECT_EQ(file.find_string("text"), "Grüße");
  EXPECT_EQ(file.find_string("empty"), "");
  EXPECT_EQ(file.require_uint("u8"), 255u);
  EXPECT_EQ(file.require_float("f64"), 0.1);
  EXPECT_EQ(file.require_string("text"), "Grüße");
}

TEST(GgufFile, ReadsEveryArrayType) {
  const auto bytes = GgufBuilder()
                         .u8_array("u8", {0, 255})
                         .i8_array("i8", {-128, 127})
                         .u16_array("u16", {1, 65535})
                         .i16_array("i16", {-32768, 3})
                         .u32_array("u32", {1, 4294967295u})
                         .i32_array("i32", {-1, 1})
                         .u64_array("u64", {1, 1ull << 63})
                         .i64_array("i64", {-1, std::numeric_limits<int64_t>::max()})
                         .f32_array("f32", {0.5f, -0.25f})
                         .f64_array("f64", {0.5, -0.25})
                         .bool_array("bool", {true, false, true})
                         .string_array("string", {"a", "", "ü"})
                         .u32_array("empty", {})
                         .build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  using Ints = std::vector<int64_t>;
  using Uints = std::vector<uint64_t>;
  EXPECT_EQ(file.find_uint_array("u8"), (Uints{0, 255}));
  EXPECT_EQ(file.find_uint_array("u16"), (Uints{1, 65535}));
  EXPECT_EQ(file.find_uint_array("u32"), (Uints{1, 4294967295u}));
  EXPECT_EQ(file.find_uint_array("u64"), (Uints{1, 1ull << 63}));
  EXPECT_EQ(file.find_int_array("u32"), (Ints{1, 4294967295}));
  EXPECT_EQ(file.find_int_array("i8"), (Ints{-128, 127}));
  EXPECT_EQ(file.find_int_array("i16"), (Ints{-32768, 3}));
  EXPECT_EQ(file.find_int_array("i32"), (Ints{-1, 1}));
  EXPECT_EQ(file.find_int_array("i64"), (Ints{-1, std::numeric_limits<int64_t>::max()}));
  EXPECT_EQ(file.find_float_array("f32"), (std::vector<float>{0.5f, -0.25f}));
  EXPECT_EQ(file.find_float_array("f64"), (std::vector<float>{0.5f, -0.25f}));
  EXPECT_EQ(file.find_bool_array("bool"), (std::vector<bool>{true, false, true}));
  EXPECT_EQ(file.find_string_array("string"), (std::vector<std::string_view>{"a", "", "ü"}));
  EXPECT_EQ(file.find_uint_array("empty"), Uints());
}

TEST(GgufFile, AbsenceIsNulloptOrAnErrorThatNamesTheKey) {
  const auto bytes = GgufBuilder().u32("here", 1).build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  EXPECT_EQ(file.find("there"), nullptr);
  EXPECT_EQ(file.find_tensor("there"), nullptr);
  EXPECT_EQ(file.find_uint("there"), std::nullopt);
  EXPECT_EQ(file.find_string_array("there"), std::nullopt);
  const auto missing = [](auto action) {
    expect_error(ErrorCode::kMalformedFile, {"'there' is missing"}, action);
  };
  missing([&] { file.require_uint("there"); });
  missing([&] { file.require_float("there"); });
  missing([&] { file.require_string("there"); });
}

TEST(GgufFile, AValueOfAnotherTypeIsRefusedByKeyFoundAndExpected) {
  const auto bytes = GgufBuilder()
                         .i32("negative", -5)
                         .f32("float", 1.5f)
                         .u32("uint", 3)
                         .string("string", "seven")
                         .string_array("strings", {"a"})
                         .i32_array("ints", {1, -2})
                         .u64_array("huge", {1, 1ull << 63})
                         .f64_array("doubles", {1e300})
                         .build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  const auto refused = [](const std::vector<std::string>& parts, auto action) {
    expect_error(ErrorCode::kMalformedFile, parts, action);
  };
  refused({"'negative'", "-5 (int32)", "at least 0"}, [&] { file.find_uint("negative"); });
  refused({"'float'", "1.5 (float32)", "integer"}, [&] { file.find_uint("float"); });
  refused({"'uint'", "3 (uint32)", "a float"}, [&] { file.find_float("uint"); });
  refused({"'uint'", "a bool"}, [&] { file.find_bool("uint"); });
  refused({"'uint'", "a string"}, [&] { file.require_string("uint"); });
  refused({"'string'", "'seven' (string)", "integer"}, [&] { file.require_uint("string"); });
  refused({"'strings'", "an array of string", "a string"}, [&] { file.find_string("strings"); });
  refused({"'uint'", "an array of"}, [&] { file.find_uint_array("uint"); });
  refused({"'strings'", "array of string", "integers"}, [&] { file.find_uint_array("strings"); });
  refused({"'strings'", "floats"}, [&] { file.find_float_array("strings"); });
  refused({"'strings'", "bools"}, [&] { file.find_bool_array("strings"); });
  refused({"'ints'", "strings"}, [&] { file.find_string_array("ints"); });
  refused({"'ints'", "element 1 is -2 (int32)"}, [&] { file.find_uint_array("ints"); });
  refused({"'huge'", "element 1 is 9223372036854775808"}, [&] { file.find_int_array("huge"); });
  refused({"'doubles'", "32 bits", "element 0"}, [&] { file.find_float_array("doubles"); });
}

TEST(GgufFile, TensorsAreTheBytesOfTheFile) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  std::vector<std::byte> blocks(2 * 144);  // two Q4_K blocks
  for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = std::byte(i);
  const auto bytes = GgufBuilder()
                         .f32_tensor("a", {3, 2}, values)
                         .tensor("b", QuantType::kQ4_K, {256, 1, 2}, blocks)
                         .f32_tensor("c", {1, 1, 1, 1}, {7})
                         .build();
  for (const uint32_t version : {2u, 3u}) {
    auto versioned = bytes;
    versioned[4] = std::byte(version);
    const GgufFile file = GgufFile::from_bytes(versioned);
    EXPECT_EQ(file.version(), version);
    EXPECT_EQ(file.file_bytes(), versioned.size());
    ASSERT_EQ(file.tensors().size(), 3u);
    EXPECT_EQ(file.tensors()[0].name, "a");
    EXPECT_EQ(file.tensors()[0].columns(), 3u);
    EXPECT_EQ(file.tensors()[0].rows(), 2u);
    EXPECT_EQ(floats(file.tensors()[0].data), values);
    const Tensor* b = file.find_tensor("b");
    ASSERT_NE(b, nullptr);
    EXPECT_EQ(b->type, QuantType::kQ4_K);
    EXPECT_EQ(b->dimensions, (std::vector<uint64_t>{256, 1, 2}));
    EXPECT_EQ(b->rows(), 2u);
    EXPECT_TRUE(std::ranges::equal(b->data, blocks));
    EXPECT_EQ(floats(file.find_tensor("c")->data), std::vector<float>{7});
  }
}

TEST(GgufFile, TensorsMayLieInAnyOrderAndWithGaps) {
  GgufBuilder builder;
  builder.f32_tensor("first", {8}, std::vector<float>(8, 1.0f));
  builder.f32_tensor("second", {8}, std::vector<float>(8, 2.0f));
  builder.f32_tensor("third", {8}, std::vector<float>(8, 3.0f));
  builder.tensors[0].offset = 64;  // where the builder puts the third
  builder.tensors[2].offset = 0;
  const auto bytes = builder.build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  EXPECT_EQ(floats(file.find_tensor("first")->data)[0], 3.0f);
  EXPECT_EQ(floats(file.find_tensor("third")->data)[0], 1.0f);

  builder.tensors.erase(builder.tensors.begin() + 1);
  builder.tensors[0].offset = 0;
  builder.tensors[1].offset = 32;
  EXPECT_NO_THROW(GgufFile::from_bytes(builder.build()));
}

TEST(GgufFile, HonoursTheAlignmentOfTheFile) {
  for (const uint32_t alignment : {8u, 16u, 32u, 64u, 4096u, 1u << 20}) {
    SCOPED_TRACE(alignment);
    GgufBuilder builder;
    builder.u32("general.alignment", alignment).alignment = alignment;
    builder.f32_tensor("a", {1}, {1}).f32_tensor("b", {1}, {2});
    const auto bytes = builder.build();
    const GgufFile file = GgufFile::from_bytes(bytes);
    EXPECT_EQ(floats(file.find_tensor("a")->data)[0], 1.0f);
    EXPECT_EQ(floats(file.find_tensor("b")->data)[0], 2.0f);
    EXPECT_EQ((file.find_tensor("b")->data.data() - bytes.data()) % ptrdiff_t(alignment), 0);
  }
}

TEST(GgufFile, AFileOfMetadataAloneIsAFile) {
  const auto nothing = GgufBuilder().build();
  EXPECT_TRUE(GgufFile::from_bytes(nothing).metadata().empty());
  const auto keys = GgufBuilder().u8("a", 1).build();  // ends inside the data section's padding
  EXPECT_TRUE(GgufFile::from_bytes(keys).tensors().empty());
}

TEST(GgufFile, NamesMayHoldAnyBytesAndMessagesEscapeThem) {
  const std::string odd("a\0b\n\xff\x1b", 6);
  GgufBuilder builder;
  builder.string(odd, std::string("x\0y", 3)).f32_tensor(odd, {1}, {1});
  const auto bytes = builder.build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  EXPECT_EQ(file.find_string(odd)->size(), 3u);
  EXPECT_NE(file.find_tensor(odd), nullptr);
  EXPECT_EQ(file.find("a"), nullptr);
  expect_error(ErrorCode::kMalformedFile, {R"('a\x00b\x0a\xff\x1b' is 'x\x00y' (string))"},
               [&] { file.find_uint(odd); });
}

TEST(GgufFile, FindsEachOfManyNames) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(seed);
  std::mt19937_64 random(seed);
  std::map<std::string, uint64_t> expected;
  GgufBuilder builder;
  while (expected.size() < 2000) {
    const std::string name = "key." + std::to_string(random() % 100000);
    if (const uint64_t value = random(); expected.emplace(name, value).second) {
      builder.u64(name, value).f32_tensor(name, {1}, {float(value)});
    }
  }
  const auto bytes = builder.build();
  const GgufFile file = GgufFile::from_bytes(bytes);
  for (const auto& [name, value] : expected) {
    ASSERT_EQ(file.find_uint(name), value) << name;
    ASSERT_EQ(floats(file.find_tensor(name)->data)[0], float(value)) << name;
    ASSERT_EQ(file.find(name + "."), nullptr);
  }
}

TEST(GgufFile, ViewsSurviveAMove) {
  const auto path = std::filesystem::path(TempDir()) / "gguf_move.gguf";
  GgufBuilder().string("key", "value").f32_tensor("t", {1}, {5}).write(path);
  GgufFile file = GgufFile::open(path);
  const Metadata* metadata = file.find("key");
  const std::string_view text = file.require_string("key");
  const GgufFile moved = std::move(file);
  EXPECT_EQ(moved.find("key"), metadata);
  EXPECT_EQ(text, "value");
  EXPECT_EQ(floats(moved.find_tensor("t")->data)[0], 5.0f);
  EXPECT_EQ(moved.file_bytes(), std::filesystem::file_size(path));
  std::filesystem::remove(path);
}

TEST(GgufFile, ErrorsNameTheFile) {
  const auto path = std::filesystem::path(TempDir()) / "gguf_bad.gguf";
  GgufBuilder builder;
  builder.version = 1;
  builder.write(path);
  expect_error(ErrorCode::kUnsupported, {path.string() + ", byte 4", "version 1"},
               [&] { GgufFile::open(path); });
  std::filesystem::remove(path);
  expect_error(ErrorCode::kIo, {path.string()}, [&] { GgufFile::open(path); });
}

// A model in three files, as gguf-split writes it: all metadata in the first.
class SplitGguf : public ::testing::Test {
 protected:
  void SetUp() override {
    directory_ = std::filesystem::path(TempDir()) /
                 (std::string("gguf_split_") +
                  ::testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(directory_);
    for (uint16_t i = 0; i < 3; ++i) {
      parts_[i].u16("split.no", i).u16("split.count", 3).i32("split.tensors.count", 4);
    }
    parts_[0].string("general.architecture", "gemma4").f32_tensor("a", {1}, {0});
    parts_[1].f32_tensor("b", {1}, {1}).f32_tensor("c", {1}, {2});
    parts_[2].f32_tensor("d", {1}, {3});
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  std::filesystem::path path(int part) const {
    return directory_ / ("m-0000" + std::to_string(part + 1) + "-of-00003.gguf");
  }
  void write() const {
    for (int i = 0; i < 3; ++i) parts_[i].write(path(i));
  }
  void expect_refused(const std::vector<std::string>& message, int part = 0,
                      ErrorCode code = ErrorCode::kMalformedFile) const {
    expect_error(code, message, [&] { GgufFile::open(path(part)); });
  }

  std::filesystem::path directory_;
  GgufBuilder parts_[3];
};

TEST_F(SplitGguf, OpensAsOneFromAnyPart) {
  write();
  uint64_t total_bytes = 0;
  for (int i = 0; i < 3; ++i) total_bytes += std::filesystem::file_size(path(i));
  for (int i = 0; i < 3; ++i) {
    const GgufFile file = GgufFile::open(path(i));
    EXPECT_EQ(file.require_string("general.architecture"), "gemma4");
    EXPECT_EQ(file.file_bytes(), total_bytes);
    ASSERT_EQ(file.tensors().size(), 4u);
    for (const int t : {0, 1, 2, 3}) {
      EXPECT_EQ(file.tensors()[t].name, std::string(1, char('a' + t)));
      EXPECT_EQ(floats(file.find_tensor(file.tensors()[t].name)->data)[0], float(t));
    }
  }
}

TEST_F(SplitGguf, AMissingPartIsNamed) {
  write();
  std::filesystem::remove(path(1));
  expect_refused({path(1).string(), "part 2 of 3", "missing"}, 0, ErrorCode::kIo);
  expect_refused({path(1).string(), "part 2 of 3", "missing"}, 2, ErrorCode::kIo);
}

TEST_F(SplitGguf, ABrokenPartIsNamed) {
  parts_[2].tensors[0].data.clear();
  write();
  expect_refused({path(2).string(), "'d'", "cut short"});
}

TEST_F(SplitGguf, PartsMustBelongTogether) {
  write();
  std::filesystem::copy_file(path(2), path(1), std::filesystem::copy_options::overwrite_existing);
  expect_refused({path(1).string(), "'split.no' is 2", "expected 1"});
  GgufBuilder().u16("split.no", 1).u16("split.count", 4).write(path(1));
  expect_refused({path(1).string(), "'split.count' is 4", "expected 3"});
  GgufBuilder().f32_tensor("b", {1}, {1}).write(path(1));
  expect_refused({path(1).string(), "'split.no' is missing"});
}

TEST_F(SplitGguf, TensorsMustBeAllThereAndOnce) {
  parts_[2].f32_tensor("a", {1}, {9});
  write();
  expect_refused({"'a'", "two parts"});
  parts_[2].tensors.clear();
  write();
  expect_refused({"'split.tensors.count' is 4", "expected 3"});
}

TEST_F(SplitGguf, ARenamedPartSaysWhatItsNameMustBe) {
  parts_[1].write(directory_ / "model.gguf");
  expect_error(ErrorCode::kMalformedFile, {"part 2", "-00002-of-00003.gguf"},
               [&] { GgufFile::open(directory_ / "model.gguf"); });
  GgufBuilder().u16("split.no", 3).u16("split.count", 3).write(path(2));
  expect_refused({"'split.no' is 3", "less than split.count, 3"}, 2);
}

TEST_F(SplitGguf, OnePartOfOneIsAFile) {
  GgufBuilder().u16("split.no", 0).u16("split.count", 1).write(directory_ / "model.gguf");
  EXPECT_NO_THROW(GgufFile::open(directory_ / "model.gguf"));
}

TEST(GgufFile, OpensTheRealModels) {
  struct Model {
    std::filesystem::path path;
    size_t keys;
    size_t tensors;
    std::map<QuantType, int> types;
    uint64_t vocabulary;
    uint64_t hidden;
    std::vector<bool> sliding;
    std::string last_tensor;
  };
  using enum QuantType;
  const std::vector<bool> ssfssf = {true, true, false, true, true, false};
  const std::string last = "blk.5.post_ffw_norm.weight";
  const auto micro = [](std::string_view name) {
    return test::fixture("models/" + std::string(name) + ".gguf");
  };
  const Model models[] = {
      {micro("micro-gemma4-f16"), 39, 85, {{kF32, 44}, {kF16, 41}}, 2048, 256, ssfssf, last},
      {micro("micro-gemma4-Q8_0"), 40, 85, {{kF32, 44}, {kQ8_0, 41}}, 2048, 256, ssfssf, last},
      {micro("micro-gemma4-Q6_K"), 40, 85, {{kF32, 44}, {kQ6_K, 41}}, 2048, 256, ssfssf, last},
      {micro("micro-gemma4-Q5_K_M"),
       40,
       85,
       {{kF32, 44}, {kQ6_K, 5}, {kQ5_K, 36}},
       2048,
       256,
       ssfssf,
       last},
      {micro("micro-gemma4-Q4_K_M"),
       40,
       85,
       {{kF32, 44}, {kQ6_K, 5}, {kQ4_K, 36}},
       2048,
       256,
       ssfssf,
       last},
      {micro("micro-gemma4-Q4_0"),
       40,
       85,
       {{kF32, 44}, {kQ6_K, 1}, {kQ4_0, 40}},
       2048,
       256,
       ssfssf,
       last},
      {micro("wide-gemma4-Q4_K_M"),
       40,
       85,
       {{kF32, 44}, {kQ6_K, 5}, {kQ4_K, 36}},
       2048,
       256,
       ssfssf,
       last},
      {test::bundled_model("tiny-gemma4-Q4_K_M.gguf"),
       40,
       113,
       {{kF32, 58}, {kQ6_K, 7}, {kQ4_K, 48}},
       8192,
       512,
       {true, true, true, false, true, true, true, false},
       "blk.7.post_ffw_norm.weight"},
  };
  for (const Model& model : models) {
    SCOPED_TRACE(model.path);
    const GgufFile file = GgufFile::open(model.path);
    EXPECT_EQ(file.version(), 3u);
    EXPECT_EQ(file.file_bytes(), std::filesystem::file_size(model.path));
    EXPECT_EQ(file.metadata().size(), model.keys);
    EXPECT_EQ(file.require_string("general.architecture"), "gemma4");
    EXPECT_EQ(file.require_uint("gemma4.embedding_length"), model.hidden);
    EXPECT_EQ(file.require_float("gemma4.attention.layer_norm_rms_epsilon"), double(1e-6f));
    EXPECT_EQ(file.find_bool("tokenizer.ggml.add_bos_token"), true);
    EXPECT_EQ(file.find_string_array("tokenizer.ggml.tokens")->size(), model.vocabulary);
    EXPECT_EQ(file.find_string_array("tokenizer.ggml.tokens")->at(2), "<bos>");
    EXPECT_EQ(file.find_float_array("tokenizer.ggml.scores")->at(1), -1.0f);
    EXPECT_EQ(file.find_int_array("tokenizer.ggml.token_type")->at(0), 3);
    EXPECT_EQ(file.find_bool_array("gemma4.attention.sliding_window_pattern"), model.sliding);
    EXPECT_EQ(file.find_tensor("token_embd.weight")->dimensions,
              (std::vector<uint64_t>{model.hidden, model.vocabulary}));
    std::map<QuantType, int> types;
    for (const Tensor& tensor : file.tensors()) ++types[tensor.type];
    EXPECT_EQ(types, model.types);
    EXPECT_EQ(file.tensors().size(), model.tensors);
    EXPECT_EQ(file.tensors().back().name, model.last_tensor);
    for (const float weight : floats(file.tensors().back().data)) {
      ASSERT_TRUE(std::isfinite(weight));
    }
  }
}

}  // namespace
}  // namespace nibble::gguf
