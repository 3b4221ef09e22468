// The row kernels of sddmm for bfloat16 inputs.
#include "sddmm_rows_variants.cuh"

namespace sprand::cuda {

cudaError_t launch_rows_bf16(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream) {
  return launch_rows<__nv_bfloat16, SPRAND_ROWS_BF16>(variant, args, grid, stream);
}

}  // namespace sprand::cuda
