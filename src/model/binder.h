#pragma once
// Tensors of a file as parts of a plan, with their shapes checked on the way.

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "backend/plan.h"
#include "gguf/gguf_file.h"

namespace nibble::model {

// What a matrix must be called and look like.
struct MatrixSpec {
  std::string name;
  uint64_t rows;
  uint64_t columns;
};

// Looks tensors up by name. All methods but find_* throw Error(kMalformedFile) that names the
// tensor, what was found and what the hyper-parameters ask for.
class Binder {
 public:
  explicit Binder(const gguf::GgufFile& file) : file_(file) {}

  bool has(std::string_view name) const { return file_.find_tensor(name) != nullptr; }

  // A weight fused from `parts`, which must agree in columns; the file's bytes are not copied.
  backend::Weight matrix(const std::vector<MatrixSpec>& parts) const;

  // A one-dimensional tensor of any float or block type, as f32.
  std::vector<float> vector(const std::string& name, uint64_t size) const;
  std::optional<std::vector<float>> find_vector(const std::string& name, uint64_t size) const;

 private:
  const gguf::GgufFile& file_;
};

}  // namespace nibble::model
