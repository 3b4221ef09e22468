// sum_splits: out[p] = partial[0, p] + partial[1, p] + ..., in that order: the end of every sddmm whose tokens were split.
//
// Grid: one thread per entry; each split is read in full lines.
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

__global__ void __launch_bounds__(kEntryThreads)
    sum_splits_kernel(const float* __restrict__ partial, float* __restrict__ out, int64_t nnz, int splits) {
  const int64_t entry = entry_of_thread();
  if (entry >= nnz) return;
  float sum = 0.f;
#pragma unroll 16  // the loads of so many splits wait together
  for (int s = 0; s < splits; ++s) sum += partial[s * nnz + entry];
  out[entry] = sum;
}

}  // namespace

cudaError_t sum_splits(const float* partial, float* out, int64_t nnz, int64_t splits, cudaStream_t stream) {
  if (nnz == 0) return cudaSuccess;
  SPRAND_LAUNCH(sum_splits_kernel, entry_grid(nnz), kEntryThreads, 0, stream, partial, out, nnz, static_cast<int>(splits));
  return cudaGetLastError();
}

}  // namespace sprand::cuda
