// gather: out[p] = weight.flat[indices[p]], the bits as they are, for every dtype of two or four bytes; zero for an index outside
// of the weight.
//
// Grid: one thread per entry; a warp reads up to 32 lines of the weight in ascending order and writes one run of `out`.
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

template <class Bits, class I>
__global__ void __launch_bounds__(kEntryThreads) gather_kernel(const Bits* __restrict__ weight, const I* __restrict__ indices,
                                                               Bits* __restrict__ out, int64_t nnz, int64_t numel) {
  const int64_t entry = entry_of_thread();
  if (entry >= nnz) return;
  const I position = indices[entry];
  out[entry] = inside(position, numel) ? weight[position] : Bits{};
}

}  // namespace

cudaError_t gather(const void* weight, int64_t numel, DType dtype, Indices indices, void* out, cudaStream_t stream) {
  if (indices.nnz == 0) return cudaSuccess;
  return with_index(indices.type, [&](auto index) {
    using I = decltype(index);
    const auto launch = [&](auto bits) {
      using Bits = decltype(bits);
      SPRAND_LAUNCH((gather_kernel<Bits, I>), entry_grid(indices.nnz), kEntryThreads, 0, stream, static_cast<const Bits*>(weight),
                    static_cast<const I*>(indices.data), static_cast<Bits*>(out), indices.nnz, numel);
      return cudaGetLastError();
    };
    return dtype == DType::f32 ? launch(uint32_t{}) : launch(uint16_t{});
  });
}

}  // namespace sprand::cuda
