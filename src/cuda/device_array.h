#pragma once
// Device memory that frees itself.

#include <cstddef>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "cuda/runtime.h"

namespace nibble::cuda {

template <class T>
class DeviceArray {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  DeviceArray() = default;
  // `size` elements of undefined contents. Throws Error(kOutOfMemory).
  explicit DeviceArray(size_t size) : size_(size) {
    if (size > 0) NIBBLE_CUDA(cudaMalloc(&data_, size * sizeof(T)));
  }
  explicit DeviceArray(std::span<const T> values) : DeviceArray(values.size()) { upload(values); }
  // Takes over what cudaMalloc() gave.
  static DeviceArray adopt(void* data, size_t size) {
    DeviceArray array;
    array.data_ = static_cast<T*>(data);
    array.size_ = size;
    return array;
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }

  // Both wait until the copy is done.
  void upload(std::span<const T> values) {
    NIBBLE_CUDA(cudaMemcpy(data_, values.data(), values.size_bytes(), cudaMemcpyHostToDevice));
  }
  std::vector<T> download() const {
    std::vector<T> values(size_);
    NIBBLE_CUDA(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace nibble::cuda
