#include "cuda/linear/many_rows.cuh"

namespace nibble::cuda {

template void launch_many_rows_kernel<CudaF16Tiled>(cudaStream_t, const ManyRowsArgs&,
                                                    const ManyRowsLaunch&);

}  // namespace nibble::cuda
