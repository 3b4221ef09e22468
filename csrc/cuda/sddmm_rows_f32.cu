// The row kernels of sddmm for float32 inputs.
#include "sddmm_rows_variants.cuh"

namespace sprand::cuda {

cudaError_t launch_rows_f32(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream) {
  return launch_rows<float, SPRAND_ROWS_F32>(variant, args, grid, stream);
}

}  // namespace sprand::cuda
