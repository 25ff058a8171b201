// Writes the seeds of gguf_fuzz into the folder named by the argument: tiny files that between them
// use every value type, the common tensor types and the keys that the reader itself looks at.

#include <filesystem>

#include "support/gguf_builder.h"

using nibble::quant::QuantType;
using nibble::test::GgufBuilder;

int main(int argc, char** argv) {
  if (argc != 2) return 2;
  const std::filesystem::path folder = argv[1];
  std::filesystem::create_directories(folder);

  GgufBuilder().write(folder / "header.gguf");
  GgufBuilder()
      .u8("a", 1)
      .i8("b", -1)
      .u16("c", 2)
      .i16("d", -2)
      .u32("e", 3)
      .i32("f", -3)
      .u64("g", 4)
      .i64("h", -4)
      .f32("i", 0.5f)
      .f64("j", 0.25)
      .boolean("k", true)
      .string("l", "text")
      .write(folder / "scalars.gguf");
  GgufBuilder()
      .u8_array("a", {1, 2})
      .i16_array("b", {-1, 2})
      .u32_array("c", {1, 2})
      .i64_array("d", {-1, 2})
      .f32_array("e", {0.5f, 1})
      .f64_array("f", {0.5, 1})
      .bool_array("g", {true, false})
      .string_array("h", {"one", "", "three"})
      .u32_array("i", {})
      .write(folder / "arrays.gguf");
  GgufBuilder()
      .f32_tensor("a", {2, 2}, {1, 2, 3, 4})
      .tensor("b", QuantType::kF16, {3, 1, 2, 1})
      .tensor("c", QuantType::kQ8_0, {32, 2})
      .tensor("d", QuantType::kQ4_K, {256})
      .write(folder / "tensors.gguf");

  GgufBuilder aligned;
  aligned.alignment = 8;
  aligned.u32("general.alignment", 8).f32_tensor("a", {1}, {1}).f32_tensor("b", {1}, {2});
  aligned.write(folder / "alignment.gguf");
  GgufBuilder old;
  old.version = 2;
  old.u16("split.no", 0).u16("split.count", 2).i32("split.tensors.count", 1);
  old.f32_tensor("a", {1}, {1}).write(folder / "version2_split.gguf");
}
