#include "cuda/linear/many_rows.cuh"

namespace nibble::cuda {

template void launch_many_rows_kernel<CudaQ5Tiled, CudaQ6Tiled>(cudaStream_t, const ManyRowsArgs&,
                                                                const ManyRowsLaunches&);

}  // namespace nibble::cuda
