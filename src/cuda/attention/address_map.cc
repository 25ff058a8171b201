#include "cuda/attention/address_map.h"

#include "base/error.h"
#include "cuda/runtime.h"

namespace nibble::cuda {

CUtensorMap address_map(uint32_t rows, uint32_t row_bytes) {
  // Of the driver, which is not linked: this program starts without one.
  void* symbol = nullptr;
  cudaDriverEntryPointQueryResult found;
  NIBBLE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000,
                                               cudaEnableDefault, &found));
  if (found != cudaDriverEntryPointSuccess)
    fail(ErrorCode::kDevice,
         "the CUDA driver has no cuTensorMapEncodeTiled: a newer one is needed");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(symbol);

  CUtensorMap map;
  const cuuint64_t sizes[] = {64, rows, 1 << 12, cuuint64_t{1} << 31};
  const cuuint64_t strides[] = {row_bytes, 16, 1 << 16};
  const cuuint32_t box[] = {64, rows, 1, 1}, steps[] = {1, 1, 1, 1};
  const CUresult result =
      encode(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 4, nullptr, sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    fail(ErrorCode::kDevice, "cuTensorMapEncodeTiled: error {}", int(result));
  return map;
}

}  // namespace nibble::cuda
