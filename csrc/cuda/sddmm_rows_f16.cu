// The row kernels of sddmm for float16 inputs.
#include "sddmm_rows_variants.cuh"

namespace sprand::cuda {

cudaError_t launch_rows_f16(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream) {
  return launch_rows<__half, SPRAND_ROWS_F16>(variant, args, grid, stream);
}

}  // namespace sprand::cuda
