// nibble_linear_bench [SECONDS]: how fast the CPU's linear runs, per weight type and shape.
//
// One row of activations should stream the weights as fast as the cores can read memory at all,
// which is measured first; many rows should keep the multipliers busy. Each line takes enough
// copies of the weight that no cache holds them.

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <random>
#include <span>
#include <vector>

#include "base/thread_pool.h"
#include "cpu/isa.h"
#include "cpu/linear/linear.h"
#include "quant/quant_type.h"

namespace {

using nibble::ThreadPool;
using nibble::backend::Weight;
using nibble::quant::QuantType;

constexpr size_t kUncachedBytes = size_t{512} << 20;

// Seconds of one call, the best of the calls made in `budget` seconds.
double best_seconds(double budget, const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (const auto start = Clock::now();
       std::chrono::duration<double>(Clock::now() - start).count() < budget;) {
    const auto begin = Clock::now();
    call();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - begin).count());
  }
  return best;
}

// Bytes per second of all threads adding up a large array.
double read_bandwidth(ThreadPool& pool, const std::vector<uint64_t>& memory, double budget) {
  std::vector<uint64_t> sums(pool.size() * 8);
  const double seconds = best_seconds(budget, [&] {
    pool.for_each_chunk(memory.size(), 1 << 16, [&](size_t begin, size_t end, uint32_t thread) {
      uint64_t sum = 0;
      for (size_t i = begin; i < end; ++i) sum += memory[i];
      sums[thread * 8] += sum;
    });
  });
  return memory.size() * sizeof(uint64_t) / seconds;
}

struct Shape {
  uint32_t rows, columns;
};

// Random bits, but for the types without blocks: there they would be NaN and subnormal, which
// some machines take their time over, so the exponents are made ordinary.
void fill(std::vector<uint64_t>& memory, QuantType type) {
  std::mt19937_64 random(1);
  const bool f32 = type == QuantType::kF32;
  const bool f16 = type == QuantType::kF16 || type == QuantType::kBF16;
  const uint64_t keep = f32 ? 0x83ffffff83ffffff : f16 ? 0x83ff83ff83ff83ff : ~uint64_t{0};
  const uint64_t set = ~keep & 0x3838383838383838;
  for (uint64_t& word : memory) word = (random() & keep) | set;
}

void measure(nibble::cpu::Linear& linear, const std::vector<uint64_t>& memory, QuantType type,
             const Shape& shape, double bandwidth, double budget) {
  const size_t bytes = shape.rows * nibble::quant::row_bytes(type, shape.columns);
  std::vector<Weight> copies;
  const auto all = std::as_bytes(std::span(memory));
  for (size_t at = 0; at + bytes <= all.size(); at += bytes) {
    Weight& weight = copies.emplace_back();
    weight.columns = shape.columns;
    weight.segments.push_back({"bench", type, shape.rows, all.subspan(at, bytes)});
  }
  for (const uint32_t batch : {1, 2, 4, 8, 16, 64, 512}) {
    const std::vector<float> x(size_t{batch} * shape.columns, 1.0f);
    std::vector<float> y(size_t{batch} * shape.rows);
    const size_t used = batch == 1 ? copies.size() : 1 + 16 / batch;
    const double seconds =
        best_seconds(budget,
                     [&] {
                       for (size_t i = 0; i < used; ++i) {
                         linear.run(copies[i % copies.size()], x.data(), batch, y.data());
                       }
                     }) /
        used;
    const double flops = 2.0 * shape.rows * shape.columns * batch;
    fmt::print("{:5} {:6} x {:<6} {:5} {:10.1f} {:7.1f} {:6.1f} {:8.0f}\n",
               nibble::quant::quant_traits(type).name, shape.rows, shape.columns, batch,
               seconds * 1e6, bytes / seconds * 1e-9, 100 * bytes / seconds / bandwidth,
               flops / seconds * 1e-9);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double budget = argc > 1 ? std::atof(argv[1]) : 0.3;
  const nibble::cpu::Isa isa = nibble::cpu::default_isa();
  ThreadPool pool;
  nibble::cpu::Linear linear(isa, pool, 512, 8192);
  std::vector<uint64_t> memory(kUncachedBytes / sizeof(uint64_t));
  for (const QuantType type :
       {QuantType::kQ4_K, QuantType::kQ5_K, QuantType::kQ6_K, QuantType::kQ8_0, QuantType::kQ4_0,
        QuantType::kF16, QuantType::kBF16, QuantType::kF32}) {
    fill(memory, type);
    const double bandwidth = read_bandwidth(pool, memory, budget);
    fmt::print("\n{}, {} threads, reading alone {:.1f} GB/s\n", nibble::cpu::isa_name(isa),
               pool.size(), bandwidth * 1e-9);
    fmt::print("{:5} {:>6} x {:<6} {:>5} {:>10} {:>7} {:>6} {:>8}\n", "type", "rows", "cols",
               "batch", "us", "GB/s", "%read", "GFLOP/s");
    for (const Shape& shape : {Shape{2048, 2048}, Shape{16384, 2048}, Shape{2048, 8192}}) {
      measure(linear, memory, type, shape, bandwidth, budget);
    }
  }
}
