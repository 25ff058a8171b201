// nibble inspect: what is in a model file, and what memory it needs.

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "backend/plan.h"
#include "base/error.h"
#include "engine/engine.h"
#include "engine/packed_model.h"
#include "nibble/commands.h"
#include "nibble/json.h"
#include "nibble/model_options.h"
#include "nibble/terminal.h"
#include "quant/quant_type.h"

namespace nibble::app {
namespace {

constexpr size_t kShownElements = 8;

// The double that prints with the fewest digits that give `value` back: 1e-6, not 9.99999997e-07.
double shortest(float value) {
  return std::isfinite(value) ? std::stod(fmt::format("{}", value)) : value;
}

boost::json::value plain_to_json(const gguf::Metadata& metadata) {
  if (const auto* text = std::get_if<std::string_view>(&metadata.value)) {
    return boost::json::string(printable(*text));
  }
  if (const auto* real = std::get_if<double>(&metadata.value)) {
    return metadata.type == gguf::ValueType::kFloat32 ? shortest(float(*real)) : *real;
  }
  if (const auto* truth = std::get_if<bool>(&metadata.value)) return *truth;
  if (const auto* number = std::get_if<int64_t>(&metadata.value)) return *number;
  return std::get<uint64_t>(metadata.value);
}

// Of arrays: element type, count and the first elements. Other values as they are.
boost::json::value to_json(const gguf::GgufFile& file, const gguf::Metadata& metadata) {
  const auto* array = std::get_if<gguf::Array>(&metadata.value);
  if (array == nullptr) return plain_to_json(metadata);

  boost::json::array first;
  const auto add = [&](const auto& elements) {
    for (size_t i = 0; i < std::min(elements->size(), kShownElements); ++i) {
      using Element = std::decay_t<decltype((*elements)[i])>;
      if constexpr (std::is_same_v<Element, std::string_view>) {
        first.emplace_back(printable((*elements)[i]));
      } else if constexpr (std::is_same_v<Element, float>) {
        first.emplace_back(shortest((*elements)[i]));
      } else if constexpr (std::is_same_v<Element, std::vector<bool>::reference>) {
        first.emplace_back(bool((*elements)[i]));
      } else {
        first.emplace_back((*elements)[i]);
      }
    }
  };
  switch (array->element_type) {
    case gguf::ValueType::kString:
      add(file.find_string_array(metadata.key));
      break;
    case gguf::ValueType::kBool:
      add(file.find_bool_array(metadata.key));
      break;
    case gguf::ValueType::kFloat32:
      add(file.find_float_array(metadata.key));
      break;
    case gguf::ValueType::kFloat64:  // no model reads these, so GgufFile has no accessor
      for (size_t i = 0; i < std::min<size_t>(array->count, kShownElements); ++i) {
        double element;
        std::memcpy(&element, array->data.data() + i * sizeof element, sizeof element);
        first.emplace_back(element);
      }
      break;
    case gguf::ValueType::kUint64:
      add(file.find_uint_array(metadata.key));
      break;
    default:
      add(file.find_int_array(metadata.key));
  }
  return {{"array_of", to_string(array->element_type)},
          {"count", array->count},
          {"first", std::move(first)}};
}

// A metadata value on one line of bounded length.
std::string to_line(const boost::json::value& value) {
  constexpr size_t kMaxBytes = 100;
  if (const auto* array = value.if_object()) {
    const boost::json::array& first = array->at("first").as_array();
    const uint64_t count = array->at("count").to_number<uint64_t>();
    std::string elements = to_text(first);
    if (count > first.size()) elements.insert(elements.size() - 1, ", ...");
    return fmt::format("{} {}: {}", count, array->at("array_of").as_string().c_str(), elements);
  }
  std::string text = to_text(value);
  if (text.size() > kMaxBytes) {
    size_t end = kMaxBytes;
    while ((uint8_t(text[end]) & 0xc0) == 0x80) --end;  // not inside a character
    text = fmt::format("{}... ({} bytes)", text.substr(0, end), text.size());
  }
  return text;
}

struct TypeTotal {
  uint64_t tensors = 0, values = 0, bytes = 0;
};

uint64_t bytes_in_file(const engine::ModelFile& model, const gguf::Tensor& tensor) {
  return model.packed() && tensor.data.empty() ? model.packed()->tiles(tensor.name).size()
                                               : tensor.data.size();
}

std::map<quant::QuantType, TypeTotal> type_totals(const engine::ModelFile& model) {
  std::map<quant::QuantType, TypeTotal> totals;
  for (const gguf::Tensor& tensor : model.gguf().tensors()) {
    TypeTotal& total = totals[tensor.type];
    ++total.tensors;
    total.values += tensor.columns() * tensor.rows();
    total.bytes += bytes_in_file(model, tensor);
  }
  return totals;
}

struct MemoryRow {
  backend::KvFormat format;
  uint32_t context;
  engine::MemoryNeeds needs;    // of one session without snapshots
  uint64_t snapshot_bytes = 0;  // of those that `chat` keeps as far as memory has room
};

// GB that GPUs are sold with.
constexpr uint32_t kCards[] = {6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 141, 180, 288};

// The smallest that holds so much and leaves 4 % to others: a display, error correction.
std::optional<uint32_t> smallest_card(uint64_t bytes) {
  for (const uint32_t card : kCards) {
    if (double(bytes) <= 0.96e9 * card) return card;
  }
  return std::nullopt;
}

// For which backends memory is computed: a packed model runs on one only.
std::vector<std::string> memory_backends(const engine::ModelFile& model) {
  if (model.packed()) return {std::string(model.packed()->backend())};
  return {"cuda", "cpu"};
}

std::vector<MemoryRow> memory_rows(const backend::Plan& plan, const std::string& backend) {
  std::set<uint32_t> contexts = {plan.trained_context};
  for (const uint32_t context : {512u, 2048u, 8192u, 32768u, 131072u}) {
    if (context <= plan.trained_context) contexts.insert(context);
  }
  std::vector<MemoryRow> rows;
  engine::EngineOptions options;
  options.backend = backend;
  for (const backend::KvOptions& kv : kv_choices(plan, options)) {
    options.kv_format = kv.format;
    for (const uint32_t context : contexts) {
      options.context = context;
      options.snapshots = engine::kTurnSnapshots;
      const uint64_t with_snapshots = memory_needs(plan, options).kv_bytes;
      options.snapshots = 0;
      const engine::MemoryNeeds needs = memory_needs(plan, options);
      rows.push_back({kv.format, context, needs, with_snapshots - needs.kv_bytes});
    }
  }
  return rows;
}

// What the file holds and what this build can do with it.
struct Inspection {
  std::filesystem::path path;
  engine::ModelFile model;
  std::optional<backend::Plan> plan;
  std::string why_not_run;  // where there is no plan
  std::string tokenizer;
};

Inspection examine(const std::string& model) {
  const std::filesystem::path path = model_path(model);
  Inspection inspection{path, engine::ModelFile::open(path), std::nullopt, "", ""};
  // A file may be well-formed and yet nothing that this build runs: then that is what it shows.
  try {
    inspection.plan = inspection.model.build_plan();
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kUnsupported) throw;
    inspection.why_not_run = error.what();
  }
  try {
    const auto tokenizer = text::Tokenizer::from_gguf(inspection.model.gguf());
    inspection.tokenizer =
        tokenizer ? fmt::format("{} tokens", tokenizer->vocabulary()) : "none (no_vocab)";
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kUnsupported) throw;
    inspection.tokenizer = fmt::format("not usable: {}", error.what());
  }
  return inspection;
}

boost::json::object to_json(const engine::PackedModel& packed) {
  boost::json::array layouts, weights;
  for (const engine::PackedLayout& layout : packed.layouts())
    layouts.push_back({{"name", layout.name}, {"version", layout.version}});
  for (const engine::PackedWeight& weight : packed.weights()) {
    boost::json::array tensors;
    for (const std::string_view tensor : weight.tensors) tensors.emplace_back(printable(tensor));
    weights.push_back({{"layout", weight.layout},
                       {"tensors", std::move(tensors)},
                       {"shape", {weight.columns, weight.rows}},
                       {"bytes", weight.data.size()},
                       {"xxh3_128", printable(weight.hash)}});
  }
  return {{"backend", packed.backend()},
          {"architecture", packed.architecture()},
          {"source",
           {{"name", printable(packed.source_name())},
            {"bytes", packed.source_bytes()},
            {"xxh3_128", printable(packed.source_hash())}}},
          {"layouts", std::move(layouts)},
          {"weights", std::move(weights)}};
}

boost::json::object to_json(const Inspection& inspection) {
  const gguf::GgufFile& file = inspection.model.gguf();
  boost::json::object metadata, types;
  boost::json::array tensors, memory;
  for (const gguf::Metadata& entry : file.metadata()) {
    metadata[printable(entry.key)] = to_json(file, entry);
  }
  for (const gguf::Tensor& tensor : file.tensors()) {
    tensors.push_back({{"name", printable(tensor.name)},
                       {"type", quant::quant_traits(tensor.type).name},
                       {"shape", boost::json::value_from(tensor.dimensions)},
                       {"bytes", bytes_in_file(inspection.model, tensor)}});
  }
  for (const auto& [type, total] : type_totals(inspection.model)) {
    types[quant::quant_traits(type).name] = {
        {"tensors", total.tensors}, {"values", total.values}, {"bytes", total.bytes}};
  }
  boost::json::object json{{"file", printable(inspection.path.string())},
                           {"gguf_version", file.version()},
                           {"bytes", inspection.model.file_bytes()},
                           {"tokenizer", printable(inspection.tokenizer)},
                           {"metadata", std::move(metadata)},
                           {"tensors", std::move(tensors)},
                           {"types", std::move(types)}};
  if (const engine::PackedModel* packed = inspection.model.packed())
    json["packed"] = to_json(*packed);
  if (!inspection.plan) {
    json["not_run_because"] = printable(inspection.why_not_run);
    return json;
  }
  for (const std::string& backend : memory_backends(inspection.model)) {
    for (const MemoryRow& row : memory_rows(*inspection.plan, backend)) {
      boost::json::object& object = memory.emplace_back(boost::json::object()).as_object();
      object = {{"backend", backend},
                {"kv", to_string(row.format)},
                {"context", row.context},
                {"weights_bytes", row.needs.weights_bytes},
                {"kv_bytes", row.needs.kv_bytes},
                {"workspace_bytes", row.needs.workspace_bytes},
                {"driver_bytes", row.needs.driver_bytes},
                {"total_bytes", row.needs.total()},
                {"snapshot_bytes", row.snapshot_bytes}};
      if (const auto card = smallest_card(row.needs.total()); card && backend != "cpu")
        object["smallest_card_gb"] = *card;
    }
  }
  json["memory"] = std::move(memory);
  return json;
}

void print_memory(const backend::Plan& plan, const std::string& backend) {
  const std::vector<MemoryRow> rows = memory_rows(plan, backend);
  const engine::MemoryNeeds& needs = rows.front().needs;
  const bool device = backend != "cpu";
  fmt::print("\nMemory on backend {}: weights {}{}, workspace {}", backend,
             human_bytes(needs.weights_bytes), device ? "" : " (the file's own pages)",
             human_bytes(needs.workspace_bytes));
  if (device) fmt::print(", the driver's own about {}", human_bytes(needs.driver_bytes));
  fmt::print("\n  {:>8}  {:>4}  {:>9}  {:>9}  {:>9}{}\n", "context", "kv", "cache", "total",
             "snapshots", device ? "  card" : "");
  for (const MemoryRow& row : rows) {
    const auto card = smallest_card(row.needs.total());
    fmt::print("  {:>8}  {:>4}  {:>9}  {:>9}  {:>9}{}\n", row.context, to_string(row.format),
               human_bytes(row.needs.kv_bytes), human_bytes(row.needs.total()),
               human_bytes(row.snapshot_bytes),
               !device ? ""
               : card  ? fmt::format("  {} GB", *card)
                       : "  none");
  }
}

void print_memory(const engine::ModelFile& model, const backend::Plan& plan) {
  for (const std::string& backend : memory_backends(model)) print_memory(plan, backend);
  fmt::print(
      "Cache is taken as a conversation grows. Snapshots, to go back to, are kept by `chat` where\n"
      "memory has room, and are not in the total.\n");
}

void print(const engine::PackedModel& packed) {
  fmt::print("\nPacked for backend {}, architecture {} and later:\n", packed.backend(),
             packed.architecture());
  fmt::print("  from {}, {} bytes, xxh3-128 {}\n", printable(packed.source_name()),
             packed.source_bytes(), printable(packed.source_hash()));
  for (const engine::PackedLayout& layout : packed.layouts()) {
    uint64_t weights = 0, bytes = 0;
    for (const engine::PackedWeight& weight : packed.weights()) {
      if (weight.layout != layout.name) continue;
      ++weights;
      bytes += weight.data.size();
    }
    fmt::print("  {:21} version {}  {:5} weights  {:>9}\n", layout.name, layout.version, weights,
               human_bytes(bytes));
  }
}

void print(const Inspection& inspection) {
  const gguf::GgufFile& file = inspection.model.gguf();
  const engine::PackedModel* packed = inspection.model.packed();
  fmt::print("{}: {}, {}\n", printable(inspection.path.string()),
             packed ? "packed model" : fmt::format("GGUF version {}", file.version()),
             human_bytes(inspection.model.file_bytes()));
  if (packed) print(*packed);

  fmt::print("\nMetadata ({} keys):\n", file.metadata().size());
  for (const gguf::Metadata& entry : file.metadata()) {
    fmt::print("  {} = {}\n", printable(entry.key), to_line(to_json(file, entry)));
  }

  fmt::print("\nTensors ({}; innermost dimension first):\n", file.tensors().size());
  size_t width = 0;
  for (const gguf::Tensor& tensor : file.tensors()) width = std::max(width, tensor.name.size());
  for (const gguf::Tensor& tensor : file.tensors()) {
    fmt::print("  {:{}}  {:7} {:16} {:>9}\n", printable(tensor.name), width,
               quant::quant_traits(tensor.type).name,
               fmt::format("{}", fmt::join(tensor.dimensions, " x ")),
               human_bytes(bytes_in_file(inspection.model, tensor)));
  }

  fmt::print("\nTypes:\n");
  for (const auto& [type, total] : type_totals(inspection.model)) {
    fmt::print("  {:7} {:5} tensors  {:>13} values  {:>9}\n", quant::quant_traits(type).name,
               total.tensors, total.values, human_bytes(total.bytes));
  }

  fmt::print("\nTokenizer: {}\n", printable(inspection.tokenizer));
  if (inspection.plan) {
    print_memory(inspection.model, *inspection.plan);
  } else {
    fmt::print("\nThis build does not run it: {}\n", printable(inspection.why_not_run));
  }
}

// Throws unless the packed model is what it should be, as far as that is asked for.
void check(const engine::ModelFile& model, bool verify, const std::string& source) {
  if (!verify && source.empty()) return;
  if (!model.packed()) fail(ErrorCode::kInvalidArgument, "only packed models have hashes to check");
  ProgressBar bar;
  if (verify) model.packed()->verify(bar.callback());
  if (!source.empty()) model.packed()->check_source(source, bar.callback());
}

}  // namespace

void add_inspect(CLI::App& app) {
  struct InspectOptions {
    std::string model;
    bool json = false, verify = false;
    std::string source;
  };
  auto options = std::make_shared<InspectOptions>();
  CLI::App* command =
      app.add_subcommand("inspect", "Show what is in a model file and what memory it needs");
  add_model(*command, options->model);
  command->add_flag("--json", options->json, "Print JSON");
  command->add_flag("--verify", options->verify,
                    "Compare a packed model with its content hashes first");
  command
      ->add_option("--source", options->source,
                   "Check that a packed model was made from this GGUF file")
      ->type_name("FILE");
  command->footer(
      "Nothing is loaded. Files that this build can't run are shown too, with the reason.\n"
      "Examples:\n"
      "  nibble inspect model.gguf\n"
      "  nibble inspect model.gguf --json | python3 -m json.tool\n"
      "  nibble inspect model.nibble --verify --source model.gguf");
  command->callback([options] {
    const Inspection inspection = examine(options->model);
    check(inspection.model, options->verify, options->source);
    if (options->json) {
      fmt::print("{}\n", to_text(to_json(inspection)));
    } else {
      print(inspection);
    }
  });
}

}  // namespace nibble::app
