// stratified_indices_ and uniform_indices_: the random positions of csrc/pattern_math.h, one thread per entry.
//
// Contract: integer arithmetic alone, the same positions as on the CPU. An entry finds its own row by bisection over the number
// of entries before a row, so threads need nothing from each other.
#include "../pattern_math.h"
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

template <class I>
__global__ void __launch_bounds__(kEntryThreads) stratified_kernel(I* __restrict__ indices, Stratified draw, int64_t nnz) {
  const int64_t entry = entry_of_thread();
  if (entry >= nnz) return;
  const uint64_t row = draw.row_of(entry);
  const uint64_t begin = draw.entries_before(row);
  indices[entry] = static_cast<I>(draw.position(row, draw.entries_before(row + 1) - begin, entry - begin));
}

template <class I>
__global__ void __launch_bounds__(kEntryThreads)
    uniform_kernel(I* __restrict__ indices, uint64_t numel, uint64_t key, int64_t nnz) {
  const int64_t entry = entry_of_thread();
  if (entry < nnz) indices[entry] = static_cast<I>(uniform_entry(numel, key, entry));
}

}  // namespace

cudaError_t stratified_indices(void* indices, IndexType type, int64_t nnz, int64_t rows, int64_t cols, uint64_t key,
                               int64_t run_rows, int64_t run_cols, cudaStream_t stream) {
  if (nnz == 0) return cudaSuccess;
  const Stratified draw(rows, cols, nnz, key, run_rows, run_cols);
  return with_index(type, [&](auto index) {
    using I = decltype(index);
    SPRAND_LAUNCH((stratified_kernel<I>), entry_grid(nnz), kEntryThreads, 0, stream, static_cast<I*>(indices), draw, nnz);
    return cudaGetLastError();
  });
}

cudaError_t uniform_indices(void* indices, IndexType type, int64_t nnz, int64_t numel, uint64_t key, cudaStream_t stream) {
  if (nnz == 0) return cudaSuccess;
  return with_index(type, [&](auto index) {
    using I = decltype(index);
    SPRAND_LAUNCH((uniform_kernel<I>), entry_grid(nnz), kEntryThreads, 0, stream, static_cast<I*>(indices),
                  static_cast<uint64_t>(numel), key, nnz);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
