#include "cuda/linear/few_rows.cuh"

namespace nibble::cuda {

template void launch_few_rows_kernel<CudaQ4SymmetricTiled, NoLayout>(cudaStream_t,
                                                                     const FewRowsArgs&,
                                                                     const FewRowsLaunch&);

}  // namespace nibble::cuda
