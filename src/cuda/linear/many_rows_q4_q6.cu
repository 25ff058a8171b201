#include "cuda/linear/many_rows.cuh"

namespace nibble::cuda {

template void launch_many_rows_kernel<CudaQ4Tiled, CudaQ6Tiled>(cudaStream_t, const ManyRowsArgs&,
                                                                const ManyRowsLaunches&);

}  // namespace nibble::cuda
