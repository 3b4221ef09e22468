// What the kernels share: element types, the choice of the kernel for a dtype, and the grid of one thread per entry.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "../emulator/simt_host.h"
#include "launch.h"

namespace sprand::cuda {

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// f(index) with a value of the C++ type of the indices.
template <class F>
cudaError_t with_index(IndexType type, F&& f) {
  return type == IndexType::i32 ? f(int32_t{}) : f(int64_t{});
}

// f(element, index) with values of the C++ types of weight and indices.
template <class F>
cudaError_t with_types(DType dtype, IndexType type, F&& f) {
  return with_index(type, [&](auto index) {
    switch (dtype) {
      case DType::f32:
        return f(float{}, index);
      case DType::f16:
        return f(__half{}, index);
      case DType::bf16:
        return f(__nv_bfloat16{}, index);
    }
    return cudaErrorInvalidValue;
  });
}

// Whether a position lies in a weight of `numel` entries.
template <class I>
__device__ __forceinline__ bool inside(I position, int64_t numel) {
  return static_cast<uint64_t>(static_cast<int64_t>(position)) < static_cast<uint64_t>(numel);
}

// Makes the compiler forget what it knows of `value`, so that what follows from it does not stay in registers around the loop.
__device__ __forceinline__ void forget(uint32_t& value) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(value));
#endif
}

// Asks for `bytes` from `from` on, which will be read soon, to be brought into L2; called by all lanes of a warp. A hint: no
// result depends on it, and nothing outside of these bytes is asked for.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* from, [[maybe_unused]] int bytes) {
#if defined(__CUDA_ARCH__)
  const size_t begin = __cvta_generic_to_global(from);
#if __CUDA_ARCH__ >= 900  // one instruction of the copy engine, in granules of 16 bytes
  const size_t first = (begin + 15) & ~size_t{15}, last = (begin + bytes) & ~size_t{15};
  if (threadIdx.x % 32 == 0 && first < last)
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(first), "r"(static_cast<uint32_t>(last - first)));
#else
  for (int at = threadIdx.x % 32 * 128; at < bytes; at += 32 * 128) asm volatile("prefetch.global.L2 [%0];" ::"l"(begin + at));
#endif
#endif
}

// Lets `kernel` have more dynamic shared memory than the 48 KB that need no asking.
template <class Kernel>
cudaError_t allow_shared([[maybe_unused]] Kernel* kernel, [[maybe_unused]] size_t bytes) {
#ifdef SPRAND_SIMT
  return cudaSuccess;
#else
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
#endif
}

// One thread per entry: neighbouring threads hold neighbouring entries, so everything stored per entry is read and written
// in full lines, and the weight in ascending order of address.
constexpr int kEntryThreads = 256;
inline dim3 entry_grid(int64_t nnz) { return dim3(static_cast<unsigned>((nnz + kEntryThreads - 1) / kEntryThreads)); }
__device__ __forceinline__ int64_t entry_of_thread() { return int64_t{blockIdx.x} * kEntryThreads + threadIdx.x; }

}  // namespace sprand::cuda
