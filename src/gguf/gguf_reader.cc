#include "gguf/gguf_reader.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "base/checked_math.h"

namespace nibble::gguf {
namespace {

// What one entry takes in the file at least: lengths, one byte of name, type, ...
constexpr uint64_t kMinMetadataBytes = 8 + 1 + 4 + 1;
constexpr uint64_t kMinTensorBytes = 8 + 1 + 4 + 8 + 4 + 8;
constexpr uint64_t kMinStringBytes = 8;
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kMaxNameBytes = 65535;  // the specification's limit for keys

// By ValueType; 0 for strings and arrays, whose size is their own.
constexpr uint8_t kFixedBytes[] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};

std::string_view read_name(ByteReader& in, std::string_view what) {
  in.expect(what);
  const uint64_t at = in.position();
  const std::string_view name = in.string();
  if (name.empty() || name.size() > kMaxNameBytes) {
    in.malformed(at, "{} has {} bytes, expected 1 to {}", what, name.size(), kMaxNameBytes);
  }
  return name;
}

ValueType read_value_type(ByteReader& in, std::string_view key) {
  const uint64_t at = in.position();
  const auto number = in.number<uint32_t>();
  if (number > uint32_t(ValueType::kFloat64)) {
    in.malformed(at, "key {} has value type {}, expected 0 to {}", quoted(key), number,
                 uint32_t(ValueType::kFloat64));
  }
  return ValueType(number);
}

bool read_bool(ByteReader& in) {
  const uint64_t at = in.position();
  const auto byte = in.number<uint8_t>();
  if (byte > 1) {
    in.malformed(at, "{} has a bool of {}, expected 0 or 1", in.subject(), byte);
  }
  return byte == 1;
}

Array read_array(ByteReader& in, std::string_view key) {
  const uint64_t type_at = in.position();
  const ValueType type = read_value_type(in, key);
  if (type == ValueType::kArray) {
    in.unsupported(type_at, "key {} is an array of arrays, which no known model needs",
                   quoted(key));
  }
  const auto count = in.number<uint64_t>();
  const uint64_t begin = in.position();
  const uint64_t element_bytes = kFixedBytes[uint32_t(type)];
  in.check_count(count, element_bytes == 0 ? kMinStringBytes : element_bytes,
                 fmt::format("elements of key {}", quoted(key)));
  if (type == ValueType::kString) {
    for (uint64_t i = 0; i < count; ++i) in.string();
  } else if (type == ValueType::kBool) {
    for (uint64_t i = 0; i < count; ++i) read_bool(in);
  } else {
    in.take(count * element_bytes);  // no wrap: check_count
  }
  return {type, count, in.bytes().subspan(begin, in.position() - begin)};
}

// A row of the tensors' table.
struct TableEntry {
  uint64_t at;  // where the row lies in the file
  uint64_t offset;
  uint64_t bytes;
};

uint64_t tensor_bytes(const ByteReader& in, uint64_t at, const Tensor& tensor) {
  const quant::QuantTraits& traits = quant::quant_traits(tensor.type);
  std::optional<uint64_t> values = 1;
  for (const uint64_t dimension : tensor.dimensions) {
    if (dimension == 0) {
      in.malformed(at, "tensor {} has a dimension of 0, expected at least 1", quoted(tensor.name));
    }
    values = values ? checked_mul(*values, dimension) : std::nullopt;
  }
  if (tensor.columns() % traits.block_values != 0) {
    in.malformed(at, "tensor {} has rows of {} values, expected a multiple of {} for {}",
                 quoted(tensor.name), tensor.columns(), traits.block_values, traits.name);
  }
  const auto bytes =
      values ? checked_mul(*values / traits.block_values, traits.block_bytes) : std::nullopt;
  if (!bytes) {
    in.malformed(at, "tensor {} of dimensions [{}] is larger than any file", quoted(tensor.name),
                 fmt::join(tensor.dimensions, ", "));
  }
  return *bytes;
}

std::string supported_types() {
  std::string list;
  for (const quant::QuantTraits& traits : quant::all_quant_traits()) {
    list += fmt::format("{}{} ({})", list.empty() ? "" : ", ", traits.name, uint32_t(traits.type));
  }
  return list;
}

std::pair<Tensor, TableEntry> read_tensor(ByteReader& in) {
  const uint64_t at = in.position();
  Tensor tensor{};
  tensor.name = read_name(in, "a tensor's name");
  in.expect("the description of tensor", tensor.name);

  const auto dimension_count = in.number<uint32_t>();
  if (dimension_count < 1 || dimension_count > kMaxDimensions) {
    in.malformed(at, "tensor {} has {} dimensions, expected 1 to {}", quoted(tensor.name),
                 dimension_count, kMaxDimensions);
  }
  for (uint32_t i = 0; i < dimension_count; ++i) {
    tensor.dimensions.push_back(in.number<uint64_t>());
  }

  const auto type = in.number<uint32_t>();
  const quant::QuantTraits* traits = quant::find_quant_traits(type);
  if (traits == nullptr) {
    in.unsupported(at, "tensor {} has type {}, expected one of {}; use the model in another quant",
                   quoted(tensor.name), type, supported_types());
  }
  tensor.type = traits->type;
  const auto offset = in.number<uint64_t>();
  const uint64_t bytes = tensor_bytes(in, at, tensor);
  return {std::move(tensor), {at, offset, bytes}};
}

void check_no_overlap(const ByteReader& in, const std::vector<Tensor>& tensors) {
  std::vector<const Tensor*> by_place;
  for (const Tensor& tensor : tensors) by_place.push_back(&tensor);
  std::sort(by_place.begin(), by_place.end(),
            [](const Tensor* a, const Tensor* b) { return a->data.data() < b->data.data(); });
  for (size_t i = 1; i < by_place.size(); ++i) {
    const Tensor& before = *by_place[i - 1];
    const Tensor& after = *by_place[i];
    if (before.data.data() + before.data.size() > after.data.data()) {
      in.malformed(uint64_t(after.data.data() - in.bytes().data()), "tensors {} and {} overlap",
                   quoted(before.name), quoted(after.name));
    }
  }
}

}  // namespace

std::string quoted(std::string_view name) {
  constexpr size_t kShown = 80;
  std::string text = "'";
  for (const char c : name.substr(0, kShown)) {
    if (c >= 0x20 && c < 0x7f) {
      text += c;
    } else {
      text += fmt::format("\\x{:02x}", uint8_t(c));
    }
  }
  return text + (name.size() > kShown ? "...'" : "'");
}

Header read_header(ByteReader& in) {
  if (in.bytes().empty()) in.malformed(0, "the file is empty, expected a GGUF model");
  in.expect("the header");
  const auto magic = in.take(4);
  const std::string_view text(reinterpret_cast<const char*>(magic.data()), magic.size());
  if (text != "GGUF") {
    in.malformed(0, "begins with {}, expected 'GGUF': this is no GGUF file", quoted(text));
  }
  const auto version = in.number<uint32_t>();
  if (version != 2 && version != 3) {
    const uint32_t swapped = __builtin_bswap32(version);
    if (swapped >= 1 && swapped <= 3) {
      in.unsupported(4, "a big-endian file (version {}), expected little-endian", swapped);
    }
    in.unsupported(4, "GGUF version {}, expected 2 or 3; convert the model again", version);
  }
  const auto tensor_count = in.number<uint64_t>();
  const auto key_count = in.number<uint64_t>();
  return {version, tensor_count, key_count};
}

Value read_scalar(ByteReader& in, ValueType type) {
  switch (type) {
    case ValueType::kUint8:
      return uint64_t(in.number<uint8_t>());
    case ValueType::kInt8:
      return int64_t(in.number<int8_t>());
    case ValueType::kUint16:
      return uint64_t(in.number<uint16_t>());
    case ValueType::kInt16:
      return int64_t(in.number<int16_t>());
    case ValueType::kUint32:
      return uint64_t(in.number<uint32_t>());
    case ValueType::kInt32:
      return int64_t(in.number<int32_t>());
    case ValueType::kUint64:
      return in.number<uint64_t>();
    case ValueType::kInt64:
      return in.number<int64_t>();
    case ValueType::kFloat32:
      return double(in.number<float>());
    case ValueType::kFloat64:
      return in.number<double>();
    case ValueType::kBool:
      return read_bool(in);
    case ValueType::kString:
      return in.string();
    case ValueType::kArray:
      break;
  }
  NIBBLE_CHECK(!"read_scalar() was asked for an array");
  return {};
}

std::vector<Metadata> read_metadata(ByteReader& in, uint64_t count) {
  in.check_count(count, kMinMetadataBytes, "keys");
  std::vector<Metadata> metadata;  // grows as entries prove to exist: `count` is only a claim
  for (uint64_t i = 0; i < count; ++i) {
    const std::string_view key = read_name(in, "a key");
    in.expect("the value of key", key);
    const ValueType type = read_value_type(in, key);
    metadata.push_back(
        {key, type,
         type == ValueType::kArray ? Value(read_array(in, key)) : read_scalar(in, type)});
  }
  return metadata;
}

std::vector<Tensor> read_tensors(ByteReader& in, uint64_t count, uint64_t alignment) {
  in.check_count(count, kMinTensorBytes, "tensors");
  std::vector<Tensor> tensors;
  std::vector<TableEntry> table;
  for (uint64_t i = 0; i < count; ++i) {
    auto [tensor, entry] = read_tensor(in);
    tensors.push_back(std::move(tensor));
    table.push_back(entry);
  }

  const auto file = in.bytes();
  const uint64_t data_begin = round_up(in.position(), alignment);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto [at, offset, bytes] = table[i];
    Tensor& tensor = tensors[i];
    if (offset % alignment != 0) {
      in.malformed(at, "tensor {} lies at offset {}, expected a multiple of the alignment {}",
                   quoted(tensor.name), offset, alignment);
    }
    const auto begin = checked_add(data_begin, offset);
    const auto end = begin ? checked_add(*begin, bytes) : std::nullopt;
    if (!end || *end > file.size()) {
      in.malformed(at,
                   "tensor {} has {} bytes at offset {} of the data section at byte {}, but the "
                   "file ends at {}; it is cut short or damaged",
                   quoted(tensor.name), bytes, offset, data_begin, file.size());
    }
    tensor.data = file.subspan(*begin, bytes);
  }
  check_no_overlap(in, tensors);
  return tensors;
}

}  // namespace nibble::gguf
