// scatter_add_: weight.flat[indices[p]] = cast(weight.flat[indices[p]] + scale * values[p]), one rounding, from float32.
//
// Contract: positions are unique, so every entry has one reader and one writer and no atomics are needed; an entry to which
// nothing is added keeps its bits. Grid: one thread per entry.
#include "../entry_math.h"
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

template <class T, class I>
__global__ void __launch_bounds__(kEntryThreads) scatter_add_kernel(T* __restrict__ weight, const I* __restrict__ indices,
                                                                    const float* __restrict__ values, float scale, int64_t nnz) {
  const int64_t entry = entry_of_thread();
  if (entry >= nnz || !changes(values[entry], scale)) return;
  T& target = weight[indices[entry]];
  target = from_float<T>(patched(to_float(target), values[entry], scale));
}

}  // namespace

cudaError_t scatter_add(void* weight, DType dtype, Indices indices, const float* values, float scale, cudaStream_t stream) {
  if (indices.nnz == 0) return cudaSuccess;
  return with_types(dtype, indices.type, [&](auto element, auto index) {
    using T = decltype(element);
    using I = decltype(index);
    SPRAND_LAUNCH((scatter_add_kernel<T, I>), entry_grid(indices.nnz), kEntryThreads, 0, stream, static_cast<T*>(weight),
                  static_cast<const I*>(indices.data), values, scale, indices.nnz);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
