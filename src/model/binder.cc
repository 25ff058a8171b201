#include "model/binder.h"

#include <fmt/ranges.h>

#include "base/error.h"

namespace nibble::model {
namespace {

const gguf::Tensor& require(const gguf::GgufFile& file, const std::string& name,
                            const std::vector<uint64_t>& dimensions) {
  const gguf::Tensor* tensor = file.find_tensor(name);
  if (tensor == nullptr) {
    fail(ErrorCode::kMalformedFile,
         "tensor {} is missing: the model's hyper-parameters ask for one of [{}]", name,
         fmt::join(dimensions, ", "));
  }
  if (tensor->dimensions != dimensions) {
    fail(ErrorCode::kMalformedFile,
         "tensor {} has dimensions [{}], but the model's hyper-parameters ask for [{}]", name,
         fmt::join(tensor->dimensions, ", "), fmt::join(dimensions, ", "));
  }
  return *tensor;
}

}  // namespace

backend::Weight Binder::matrix(const std::vector<MatrixSpec>& parts) const {
  NIBBLE_CHECK(!parts.empty());
  backend::Weight weight;
  uint64_t rows = 0;
  for (const MatrixSpec& part : parts) {
    NIBBLE_CHECK(part.columns == parts.front().columns);
    const gguf::Tensor& tensor = require(file_, part.name, {part.columns, part.rows});
    rows += part.rows;
    if (part.columns > INT32_MAX || rows > INT32_MAX) {
      fail(ErrorCode::kUnsupported, "tensor {} is too large: at most {} rows and columns are run",
           part.name, INT32_MAX);
    }
    weight.segments.push_back(
        {.name = part.name, .type = tensor.type, .rows = uint32_t(part.rows), .data = tensor.data});
  }
  weight.columns = uint32_t(parts.front().columns);
  return weight;
}

std::vector<float> Binder::vector(const std::string& name, uint64_t size) const {
  const gguf::Tensor& tensor = require(file_, name, {size});
  std::vector<float> values(size);
  quant::quant_traits(tensor.type).dequantize(tensor.data, values);
  return values;
}

std::optional<std::vector<float>> Binder::find_vector(const std::string& name,
                                                      uint64_t size) const {
  if (!has(name)) return std::nullopt;
  return vector(name, size);
}

}  // namespace nibble::model
