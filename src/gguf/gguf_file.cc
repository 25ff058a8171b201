#include "gguf/gguf_file.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <iterator>
#include <limits>
#include <system_error>
#include <type_traits>
#include <utility>

#include "gguf/byte_reader.h"
#include "gguf/gguf_reader.h"

namespace nibble::gguf {
namespace {

constexpr uint64_t kDefaultAlignment = 32;
constexpr uint64_t kMinAlignment = 8;
constexpr uint64_t kMaxAlignment = 1 << 20;  // far above any page size that a file may be laid for

// Pointers to `items`, ordered by name; on_duplicate(item) is called for a name seen before, and
// must throw. The order serves find() too: unlike a hash table it has no bad case to be forced.
template <class Item, class OnDuplicate>
std::vector<const Item*> ordered(const std::vector<Item>& items, std::string_view Item::*name,
                                 OnDuplicate on_duplicate) {
  std::vector<const Item*> order;
  order.reserve(items.size());
  for (const Item& item : items) order.push_back(&item);
  std::sort(order.begin(), order.end(), [name](const Item* a, const Item* b) {
    return std::pair(a->*name, a) < std::pair(b->*name, b);  // of two equals the later is reported
  });
  for (size_t i = 1; i < order.size(); ++i) {
    if (order[i]->*name == order[i - 1]->*name) on_duplicate(*order[i]);
  }
  return order;
}

template <class Item>
const Item* find_in(const std::vector<const Item*>& order, std::string_view Item::*name,
                    std::string_view wanted) {
  const auto found =
      std::lower_bound(order.begin(), order.end(), wanted,
                       [name](const Item* item, std::string_view w) { return item->*name < w; });
  return found != order.end() && (*found)->*name == wanted ? *found : nullptr;
}

// Conversions from a value in a file to what a caller asked for; nullopt when it isn't one.
std::optional<uint64_t> as_uint(const Value& value) {
  if (const auto* number = std::get_if<uint64_t>(&value)) return *number;
  const auto* number = std::get_if<int64_t>(&value);
  return number != nullptr && *number >= 0 ? std::optional(uint64_t(*number)) : std::nullopt;
}
std::optional<int64_t> as_int(const Value& value) {
  if (const auto* number = std::get_if<int64_t>(&value)) return *number;
  const auto* number = std::get_if<uint64_t>(&value);
  return number != nullptr && *number <= uint64_t(std::numeric_limits<int64_t>::max())
             ? std::optional(int64_t(*number))
             : std::nullopt;
}
std::optional<float> as_float32(const Value& value) {
  const auto* number = std::get_if<double>(&value);
  if (number == nullptr) return std::nullopt;
  const bool fits =
      !std::isfinite(*number) || std::abs(*number) <= double(std::numeric_limits<float>::max());
  return fits ? std::optional(float(*number)) : std::nullopt;
}
template <class T>
std::optional<T> as(const Value& value) {
  const auto* held = std::get_if<T>(&value);
  return held != nullptr ? std::optional(*held) : std::nullopt;
}

// As a message shows it: "-5 (int32)", "'gemma4' (string)", "an array of string".
std::string described(const Value& value, ValueType type) {
  return std::visit(
      [type](const auto& held) {
        using Held = std::decay_t<decltype(held)>;
        if constexpr (std::is_same_v<Held, Array>) {
          return fmt::format("an array of {}", to_string(held.element_type));
        } else if constexpr (std::is_same_v<Held, std::string_view>) {
          return fmt::format("{} ({})", quoted(held), to_string(type));
        } else {
          return fmt::format("{} ({})", held, to_string(type));
        }
      },
      value);
}

std::string split_suffix(uint64_t part, uint64_t count) {
  return fmt::format("-{:05}-of-{:05}.gguf", part + 1, count);
}

}  // namespace

std::string_view to_string(ValueType type) {
  constexpr std::string_view kNames[] = {"uint8",  "int8",    "uint16", "int16",  "uint32",
                                         "int32",  "float32", "bool",   "string", "array",
                                         "uint64", "int64",   "float64"};
  return uint32_t(type) < std::size(kNames) ? kNames[uint32_t(type)] : "unknown";
}

GgufFile GgufFile::from_bytes(std::span<const std::byte> bytes, std::string name) {
  return read(bytes, std::move(name));
}

GgufFile GgufFile::read(std::span<const std::byte> bytes, std::string name) {
  GgufFile file;
  file.name_ = std::move(name);
  file.first_part_ = bytes;
  file.file_bytes_ = bytes.size();

  ByteReader in(bytes, file.name_);
  const Header header = read_header(in);
  file.version_ = header.version;
  const uint64_t metadata_begin = in.position();
  file.metadata_ = read_metadata(in, header.key_count);
  file.metadata_bytes_ = bytes.subspan(metadata_begin, in.position() - metadata_begin);
  file.metadata_by_key_ = ordered(file.metadata_, &Metadata::key, [&in](const Metadata& again) {
    in.malformed(in.offset_of(again.key), "key {} occurs twice", quoted(again.key));
  });

  const uint64_t alignment = file.find_uint("general.alignment").value_or(kDefaultAlignment);
  if (!std::has_single_bit(alignment) || alignment < kMinAlignment || alignment > kMaxAlignment) {
    file.fail_value(*file.find("general.alignment"),
                    fmt::format("a power of two from {} to {}", kMinAlignment, kMaxAlignment));
  }
  file.tensors_ = read_tensors(in, header.tensor_count, alignment);
  file.tensors_by_name_ = ordered(file.tensors_, &Tensor::name, [&in](const Tensor& again) {
    in.malformed(in.offset_of(again.name), "tensor {} occurs twice", quoted(again.name));
  });
  return file;
}

GgufFile GgufFile::open_part(const std::filesystem::path& path) {
  MappedFile mapping = MappedFile::open(path);
  GgufFile file = read(mapping.bytes(), path.string());
  file.parts_.push_back(std::move(mapping));
  return file;
}

GgufFile GgufFile::open(const std::filesystem::path& path) {
  GgufFile opened = open_part(path);
  const uint64_t count = opened.find_uint("split.count").value_or(1);
  if (count <= 1) return opened;

  const uint64_t opened_part = opened.require_uint("split.no");
  if (opened_part >= count) {
    opened.fail_value(*opened.find("split.no"), fmt::format("less than split.count, {}", count));
  }
  const std::string suffix = split_suffix(opened_part, count);
  const std::string file_name = path.filename().string();
  if (!file_name.ends_with(suffix)) {
    fail(ErrorCode::kMalformedFile,
         "{}: this is part {} of a model in {} files; its name must end in {} so that the others "
         "are found beside it",
         path.string(), opened_part + 1, count, suffix);
  }

  const std::string stem = file_name.substr(0, file_name.size() - suffix.size());
  const auto part = [&](uint64_t index) {
    if (index == opened_part) return std::move(opened);
    const auto part_path = path.parent_path() / (stem + split_suffix(index, count));
    std::error_code ignored;
    if (!std::filesystem::exists(part_path, ignored)) {
      fail(ErrorCode::kIo, "{}: part {} of {} of the model is missing; expected it beside {}",
           part_path.string(), index + 1, count, path.string());
    }
    GgufFile file = open_part(part_path);
    file.expect_uint("split.no", index);
    file.expect_uint("split.count", count);
    return file;
  };
  GgufFile whole = part(0);
  for (uint64_t index = 1; index < count; ++index) whole.append(part(index));
  whole.index_joined_tensors();
  return whole;
}

void GgufFile::append(GgufFile part) {
  file_bytes_ += part.file_bytes_;
  std::move(part.parts_.begin(), part.parts_.end(), std::back_inserter(parts_));
  std::move(part.tensors_.begin(), part.tensors_.end(), std::back_inserter(tensors_));
}

void GgufFile::describe_tensors(std::vector<Tensor> tensors) {
  std::move(tensors.begin(), tensors.end(), std::back_inserter(tensors_));
  index_joined_tensors();
}

void GgufFile::index_joined_tensors() {
  tensors_by_name_ = ordered(tensors_, &Tensor::name, [this](const Tensor& again) {
    fail(ErrorCode::kMalformedFile, "{}: tensor {} occurs in two parts of the model", name_,
         quoted(again.name));
  });
  if (const Metadata* announced = find("split.tensors.count")) {
    if (as_uint(announced->value) != tensors_.size()) {
      fail_value(*announced, fmt::format("{}, the tensors in all parts", tensors_.size()));
    }
  }
}

void GgufFile::expect_uint(std::string_view key, uint64_t expected) const {
  if (require_uint(key) != expected) fail_value(*find(key), fmt::to_string(expected));
}

const Metadata* GgufFile::find(std::string_view key) const {
  return find_in(metadata_by_key_, &Metadata::key, key);
}

const Tensor* GgufFile::find_tensor(std::string_view name) const {
  return find_in(tensors_by_name_, &Tensor::name, name);
}

void GgufFile::fail_value(const Metadata& metadata, std::string_view expected) const {
  const ByteReader in(first_part_, name_);
  in.malformed(in.offset_of(metadata.key), "key {} is {}, expected {}", quoted(metadata.key),
               described(metadata.value, metadata.type), expected);
}

template <class T>
std::optional<T> GgufFile::find_scalar(std::string_view key, std::string_view expected,
                                       std::optional<T> (*convert)(const Value&)) const {
  const Metadata* metadata = find(key);
  if (metadata == nullptr) return std::nullopt;
  const std::optional<T> value = convert(metadata->value);
  if (!value) fail_value(*metadata, expected);
  return value;
}

template <class T>
std::optional<std::vector<T>> GgufFile::find_array(
    std::string_view key, std::string_view expected,
    std::optional<T> (*convert)(const Value&)) const {
  const Metadata* metadata = find(key);
  if (metadata == nullptr) return std::nullopt;
  const auto* array = std::get_if<Array>(&metadata->value);
  if (array == nullptr) fail_value(*metadata, fmt::format("an array of {}", expected));

  ByteReader in(array->data, name_);
  std::vector<T> values;
  values.reserve(array->count);  // open() has seen every element
  for (uint64_t i = 0; i < array->count; ++i) {
    const Value element = read_scalar(in, array->element_type);
    const std::optional<T> value = convert(element);
    if (!value) {
      fail_value(*metadata, fmt::format("{} (element {} is {})", expected, i,
                                        described(element, array->element_type)));
    }
    values.push_back(*value);
  }
  return values;
}

std::optional<uint64_t> GgufFile::find_uint(std::string_view key) const {
  return find_scalar<uint64_t>(key, "an integer of at least 0", as_uint);
}
std::optional<double> GgufFile::find_float(std::string_view key) const {
  return find_scalar<double>(key, "a float", as<double>);
}
std::optional<bool> GgufFile::find_bool(std::string_view key) const {
  return find_scalar<bool>(key, "a bool", as<bool>);
}
std::optional<std::string_view> GgufFile::find_string(std::string_view key) const {
  return find_scalar<std::string_view>(key, "a string", as<std::string_view>);
}
std::optional<std::vector<uint64_t>> GgufFile::find_uint_array(std::string_view key) const {
  return find_array<uint64_t>(key, "integers of at least 0", as_uint);
}
std::optional<std::vector<int64_t>> GgufFile::find_int_array(std::string_view key) const {
  return find_array<int64_t>(key, "integers below 2^63", as_int);
}
std::optional<std::vector<float>> GgufFile::find_float_array(std::string_view key) const {
  return find_array<float>(key, "floats of 32 bits", as_float32);
}
std::optional<std::vector<bool>> GgufFile::find_bool_array(std::string_view key) const {
  return find_array<bool>(key, "bools", as<bool>);
}
std::optional<std::vector<std::string_view>> GgufFile::find_string_array(
    std::string_view key) const {
  return find_array<std::string_view>(key, "strings", as<std::string_view>);
}

namespace {

template <class T>
T required(std::optional<T> value, std::string_view file, std::string_view key) {
  if (!value) fail(ErrorCode::kMalformedFile, "{}: key {} is missing", file, quoted(key));
  return *value;
}

}  // namespace

uint64_t GgufFile::require_uint(std::string_view key) const {
  return required(find_uint(key), name_, key);
}
double GgufFile::require_float(std::string_view key) const {
  return required(find_float(key), name_, key);
}
std::string_view GgufFile::require_string(std::string_view key) const {
  return required(find_string(key), name_, key);
}

}  // namespace nibble::gguf
