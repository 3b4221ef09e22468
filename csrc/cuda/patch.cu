// patch_: weight.flat[indices[p]] = cast(base[p] + scale * delta[p]), or the stored bits of base where nothing is added.
//
// Contract: set from base, never added to what the weight holds, so any number of calls ends in the same bits, and a call without
// delta puts the base back. Positions are unique: every store has one writer. Grid: one thread per entry.
#include "../entry_math.h"
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

template <class T, class I>
__global__ void __launch_bounds__(kEntryThreads)
    patch_kernel(T* __restrict__ weight, const I* __restrict__ indices, const T* __restrict__ base,
                 const float* __restrict__ delta, float scale, int64_t nnz) {
  const int64_t entry = entry_of_thread();
  if (entry >= nnz) return;
  T value = base[entry];
  if (delta != nullptr && changes(delta[entry], scale)) value = from_float<T>(patched(to_float(value), delta[entry], scale));
  weight[indices[entry]] = value;
}

}  // namespace

cudaError_t patch(void* weight, DType dtype, Indices indices, const void* base, const float* delta, float scale,
                  cudaStream_t stream) {
  if (indices.nnz == 0) return cudaSuccess;
  return with_types(dtype, indices.type, [&](auto element, auto index) {
    using T = decltype(element);
    using I = decltype(index);
    SPRAND_LAUNCH((patch_kernel<T, I>), entry_grid(indices.nnz), kEntryThreads, 0, stream, static_cast<T*>(weight),
                  static_cast<const I*>(indices.data), static_cast<const T*>(base), delta, scale, indices.nnz);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
