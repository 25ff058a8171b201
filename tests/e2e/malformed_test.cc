// Model files that are wrong: each is refused with a message and exit code 1, quickly and in
// bounded memory. The unit tests of gguf, text and model know each check's message; here the whole
// program must hold.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>

#include "e2e/nibble.h"
#include "support/gguf_builder.h"

namespace nibble::test {
namespace {

constexpr double kSeconds = 10;

// The bytes of a good file, with the places that tests damage.
class Bytes {
 public:
  explicit Bytes(std::string bytes) : bytes_(std::move(bytes)) {}

  // The value behind a metadata key of `type`, or the four bytes of its type.
  size_t value_of(const std::string& key) const { return type_of(key) + 4; }
  size_t type_of(const std::string& key) const {
    const size_t place = bytes_.find(gguf_string(key));
    if (place == std::string::npos) throw std::runtime_error("no key " + key);
    return place + 8 + key.size();
  }
  // A tensor's entry behind its name: dimension count, dimensions, type, offset.
  size_t tensor_entry(const std::string& name) const { return type_of(name); }

  template <class T>
  void put(size_t place, T value) {
    std::memcpy(&bytes_.at(place), &value, sizeof value);
  }
  template <class T>
  T get(size_t place) const {
    T value;
    std::memcpy(&value, &bytes_.at(place), sizeof value);
    return value;
  }
  void truncate(size_t size) { bytes_.resize(size); }
  std::string& text() { return bytes_; }

 private:
  std::string bytes_;
};

struct Damage {
  std::string name;
  std::function<void(Bytes& file)> apply;
};

class ModelFile {
 public:
  explicit ModelFile(const std::string& bytes) {
    std::ofstream(path_, std::ios::binary).write(bytes.data(), std::streamsize(bytes.size()));
  }
  ~ModelFile() { std::filesystem::remove(path_); }
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_ = std::filesystem::temp_directory_path() /
                                ("nibble_malformed." + std::to_string(::getpid()) + ".gguf");
};

Outcome ask(const std::string& bytes) {
  const ModelFile file(bytes);
  return nibble({"run", file.path(), "-p", "x", "-n", "2", "--temp", "0"}, "", kSeconds);
}

void expect_refused(const Outcome& outcome) {
  EXPECT_FALSE(outcome.timed_out);
  EXPECT_EQ(outcome.exit_code, 1) << "signal " << outcome.signal << "\n" << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_TRUE(outcome.err.starts_with("nibble: ")) << outcome.err;
  EXPECT_GT(outcome.err.size(), 20u);
}

const std::string& good_file() {
  static const std::string bytes = read_file(micro("Q4_0"));
  return bytes;
}

void expect_all_refused(const std::vector<Damage>& damages) {
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.name);
    Bytes file(good_file());
    damage.apply(file);
    expect_refused(ask(file.text()));
  }
}

// Damage that puts `value` where the metadata key's value is.
template <class T>
Damage key_is(const std::string& key, T value) {
  return {key + " = " + std::to_string(value),
          [=](Bytes& file) { file.put(file.value_of(key), value); }};
}

constexpr size_t kMagic = 0, kVersion = 4, kTensorCount = 8, kKeyCount = 16;

TEST(Malformed, TheGoodFileRuns) {
  const Outcome outcome = ask(good_file());
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
}

TEST(Malformed, HeadersThatLie) {
  const auto header = [](const std::string& name, size_t place, auto value) {
    return Damage{name, [=](Bytes& file) { file.put(place, value); }};
  };
  expect_all_refused({
      header("magic", kMagic, uint32_t{0x46554748}),
      header("version 0", kVersion, uint32_t{0}),
      header("version 1", kVersion, uint32_t{1}),
      header("version 4", kVersion, uint32_t{4}),
      header("big-endian", kVersion, uint32_t{0x03000000}),
      header("2^63 tensors", kTensorCount, uint64_t{1} << 63),
      header("2^32 tensors", kTensorCount, uint64_t{1} << 32),
      header("no tensors", kTensorCount, uint64_t{0}),
      header("2^64-1 keys", kKeyCount, UINT64_MAX),
      header("2^30 keys", kKeyCount, uint64_t{1} << 30),
      header("no keys", kKeyCount, uint64_t{0}),
      header("first key of 2^62 bytes", 24, uint64_t{1} << 62),
  });
}

TEST(Malformed, TruncatedAnywhere) {
  const size_t size = good_file().size();
  const size_t tensors = Bytes(good_file()).tensor_entry("output_norm.weight");
  std::vector<Damage> damages;
  for (const size_t length : {size_t{0}, size_t{1}, size_t{4}, size_t{23}, size_t{24}, size_t{60},
                              size_t{1000}, size_t{40000}, tensors - 30, tensors + 3,
                              tensors + 2000, tensors + 20000, size / 2, size - 1}) {
    damages.push_back(
        {std::to_string(length) + " bytes are left", [=](Bytes& file) { file.truncate(length); }});
  }
  expect_all_refused(damages);
}

TEST(Malformed, HyperparametersThatDontFitTheTensors) {
  std::vector<Damage> damages;
  for (const char* key :
       {"block_count", "embedding_length", "feed_forward_length", "attention.head_count",
        "attention.key_length", "attention.value_length", "attention.key_length_swa",
        "attention.value_length_swa", "attention.sliding_window"}) {
    for (const uint32_t value : {uint32_t{0}, uint32_t{1} << 31, UINT32_MAX}) {
      damages.push_back(key_is("gemma4." + std::string(key), value));
    }
  }
  damages.push_back(key_is("gemma4.block_count", uint32_t{5000}));
  damages.push_back(key_is("gemma4.attention.head_count", uint32_t{3}));
  damages.push_back(key_is("gemma4.context_length", uint32_t{0}));
  damages.push_back(key_is("gemma4.attention.layer_norm_rms_epsilon", -1.0f));
  damages.push_back(key_is("gemma4.rope.freq_base", 0.0f));
  damages.push_back(key_is("gemma4.embedding_length_per_layer_input", uint32_t{256}));
  damages.push_back(key_is("gemma4.attention.shared_kv_layers", uint32_t{2}));
  damages.push_back({"another architecture", [](Bytes& file) {
                       file.put(file.value_of("general.architecture") + 8, 'l');
                     }});
  expect_all_refused(damages);
}

TEST(Malformed, MetadataOfTheWrongKind) {
  const auto array_count = [](const std::string& key, uint64_t count) {
    return Damage{key + " of " + std::to_string(count) + " elements",
                  [=](Bytes& file) { file.put(file.value_of(key) + 4, count); }};
  };
  const auto typed = [](const std::string& key, uint32_t type) {
    return Damage{key + " of type " + std::to_string(type),
                  [=](Bytes& file) { file.put(file.type_of(key), type); }};
  };
  const auto elements = [](const std::string& key, uint32_t type) {
    return Damage{key + " with elements of type " + std::to_string(type),
                  [=](Bytes& file) { file.put(file.value_of(key), type); }};
  };
  expect_all_refused({
      array_count("tokenizer.ggml.tokens", uint64_t{1} << 60),
      array_count("tokenizer.ggml.tokens", uint64_t{1} << 30),
      array_count("tokenizer.ggml.scores", UINT64_MAX),
      array_count("tokenizer.ggml.token_type", uint64_t{1} << 62),
      typed("gemma4.block_count", 6),
      typed("gemma4.block_count", 99),
      typed("general.architecture", 9),
      elements("tokenizer.ggml.tokens", 9),
      elements("tokenizer.ggml.tokens", 77),
      elements("gemma4.attention.sliding_window_pattern", 0),
      key_is("tokenizer.ggml.bos_token_id", uint32_t{2048}),
      key_is("tokenizer.ggml.eos_token_id", UINT32_MAX),
      key_is("tokenizer.ggml.add_bos_token", uint8_t{2}),
      key_is("general.alignment", uint32_t{0}),
      key_is("general.alignment", uint32_t{3}),
      key_is("general.alignment", uint32_t{1} << 31),
  });
}

TEST(Malformed, TensorsThatLie) {
  const auto tensor = [](const std::string& name, const std::string& what, auto apply) {
    return Damage{what, [=](Bytes& file) { apply(file, file.tensor_entry(name)); }};
  };
  const std::string norm = "output_norm.weight", table = "token_embd.weight";
  // Behind the dimension count (4 bytes): one or two dimensions of 8, the type (4), the offset.
  constexpr size_t kDimensions = 4, kTypeOfNorm = 12, kOffsetOfNorm = 16, kTypeOfTable = 20,
                   kOffsetOfTable = 24;
  const auto put = [&](const std::string& name, const std::string& what, size_t place, auto value) {
    return tensor(name, what, [=](Bytes& file, size_t entry) { file.put(entry + place, value); });
  };
  expect_all_refused({
      put(norm, "no dimensions", 0, uint32_t{0}),
      put(norm, "5 dimensions", 0, uint32_t{5}),
      put(norm, "2^32-1 dimensions", 0, UINT32_MAX),
      put(norm, "a dimension of 0", kDimensions, uint64_t{0}),
      put(norm, "a dimension of 2^62", kDimensions, uint64_t{1} << 62),
      put(norm, "a dimension that wraps in bytes", kDimensions, (uint64_t{1} << 62) + 256),
      put(table, "dimensions whose product wraps", kDimensions + 8, uint64_t{1} << 56),
      put(table, "rows that are no whole blocks", kDimensions, uint64_t{255}),
      put(table, "more rows than bytes", kDimensions + 8, uint64_t{1} << 20),
      put(norm, "an unknown type", kTypeOfNorm, uint32_t{4711}),
      put(norm, "a removed type", kTypeOfNorm, uint32_t{4}),
      put(table, "a type of other size", kTypeOfTable, uint32_t{0}),
      put(norm, "an offset past the end", kOffsetOfNorm, uint64_t{1} << 40),
      put(norm, "an offset that wraps", kOffsetOfNorm, UINT64_MAX - 31),
      put(norm, "an unaligned offset", kOffsetOfNorm, uint64_t{1}),
      put(table, "tensors that overlap", kOffsetOfTable, uint64_t{0}),
      tensor(norm, "two tensors of one name",
             [](Bytes& file, size_t) {
               const size_t place = file.text().find("blk.0.attn_k.weight");
               file.text().replace(place, 5, "blk.1");
             }),
  });
}

TEST(Malformed, ScalesThatAreNoNumbers) {
  const auto scale_of = [](const std::string& tensor, uint16_t half) {
    return Damage{fmt::format("a scale of {:#x} in {}", half, tensor), [=](Bytes& file) {
                    // The last row of the table (one dimension) ends where the data begins.
                    const size_t table_end = file.tensor_entry("blk.5.post_ffw_norm.weight") + 24;
                    const size_t data = (table_end + 31) / 32 * 32;
                    // Behind the count, two dimensions and the type.
                    const auto offset = file.get<uint64_t>(file.tensor_entry(tensor) + 24);
                    file.put(data + offset, half);  // of the first block
                  }};
  };
  constexpr uint16_t kNan = 0x7e00, kInfinity = 0x7c00;
  std::vector<Damage> damages;
  for (const char* tensor : {"blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.3.ffn_gate.weight",
                             "blk.5.ffn_down.weight"}) {
    damages.push_back(scale_of(tensor, kNan));
    damages.push_back(scale_of(tensor, kInfinity));
  }
  for (const Damage& damage : damages) {
    SCOPED_TRACE(damage.name);
    Bytes file(good_file());
    damage.apply(file);
    const Outcome outcome = ask(file.text());
    EXPECT_EQ(outcome.exit_code, 1) << outcome.err;
    EXPECT_EQ(outcome.out.find_first_not_of('\n'), std::string::npos);
    EXPECT_NE(outcome.err.find("NaN"), std::string::npos) << outcome.err;
  }
}

// Any bytes at all in the part that is parsed: the file may turn out to be good, but nothing worse
// may happen than a refusal.
TEST(Malformed, RandomDamageIsRefusedOrHarmless) {
  const uint32_t seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const size_t parsed = Bytes(good_file()).tensor_entry("blk.5.post_ffw_norm.weight");
  constexpr int kMutants = kSanitized ? 20 : 60;
  for (int i = 0; i < kMutants; ++i) {
    SCOPED_TRACE("mutant " + std::to_string(i));
    std::string bytes = good_file();
    // Half of the damage falls on the keys at the start, the rest anywhere before the data.
    const size_t range = i % 2 == 0 ? 2500 : parsed;
    const int changes = 1 + int(random() % 4);
    for (int change = 0; change < changes; ++change) {
      const char kExtremes[] = {0, 1, 127, char(128), char(255), char(random())};
      bytes[random() % range] = kExtremes[random() % std::size(kExtremes)];
    }
    const Outcome outcome = ask(bytes);
    EXPECT_FALSE(outcome.timed_out);
    EXPECT_TRUE(outcome.exit_code == 0 || outcome.exit_code == 1)
        << "exit code " << outcome.exit_code << ", signal " << outcome.signal << "\n"
        << outcome.err;
    if (outcome.exit_code == 1) {
      EXPECT_NE(outcome.err, "");
    }
  }
}

TEST(Malformed, InspectShowsWhatItCantRun) {
  GgufBuilder file;
  file.string("general.architecture", "llama").u32("llama.block_count", 2);
  file.string("general.name", "an \x1b[31mescape").string("tokenizer.ggml.model", "gpt2");
  file.f32_tensor("output_norm.weight", {4}, {1, 1, 1, 1});
  const std::vector<std::byte> bytes = file.build();
  const ModelFile model({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
  const Outcome shown = nibble({"inspect", model.path()});
  EXPECT_EQ(shown.exit_code, 0) << shown.err;
  EXPECT_NE(shown.out.find("output_norm.weight"), std::string::npos);
  EXPECT_NE(shown.out.find("does not run it"), std::string::npos);
  EXPECT_EQ(shown.out.find('\x1b'), std::string::npos) << "a file may not drive the terminal";
  EXPECT_EQ(nibble({"inspect", model.path(), "--json"}).exit_code, 0);
  expect_refused(nibble({"run", model.path(), "-p", "x"}));
}

}  // namespace
}  // namespace nibble::test
