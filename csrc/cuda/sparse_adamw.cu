// sparse_adamw_: one AdamW step of a target's delta (arXiv 1711.05101) and the patch of its weight, in one pass over memory.
//
// Contract: step, lr_tensor, grad_coef and found_inf are read here, from device memory; where found_inf is not zero nothing is
// written. Positions are unique. Grid: one thread per entry, one launch per target; the first thread of a block computes, in
// double, what the entries share (bias corrections, step size) and hands it on through shared memory.
#include "../entry_math.h"
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

template <class T, class I>
__global__ void __launch_bounds__(kEntryThreads)
    sparse_adamw_kernel(T* __restrict__ weight, const I* __restrict__ indices, const T* __restrict__ base,
                        float* __restrict__ delta, const float* __restrict__ grad, float* __restrict__ exp_avg,
                        float* __restrict__ exp_avg_sq, const float* __restrict__ step, float scale, AdamWOptions options,
                        int64_t nnz) {
  if (options.found_inf != nullptr && *options.found_inf != 0.f) return;  // the same for every thread
  __shared__ AdamW<float> shared;
  if (threadIdx.x == 0) {
    const double lr = options.lr_tensor != nullptr ? double{*options.lr_tensor} : options.lr;
    const double coef = options.grad_coef != nullptr ? double{*options.grad_coef} : 1.0;
    shared = adamw_step<float>(lr, options.beta1, options.beta2, options.eps, options.weight_decay, double{*step},
                               options.maximize ? -coef : coef);
  }
  __syncthreads();
  const int64_t entry = entry_of_thread();
  if (entry >= nnz) return;
  float m = exp_avg[entry], v = exp_avg_sq[entry];
  const float d = adamw_entry(shared, delta[entry], grad[entry], m, v);
  exp_avg[entry] = m;
  exp_avg_sq[entry] = v;
  delta[entry] = d;
  T value = base[entry];
  if (changes(d, scale)) value = from_float<T>(patched(to_float(value), d, scale));
  weight[indices[entry]] = value;
}

}  // namespace

cudaError_t sparse_adamw(const AdamWTarget& target, const AdamWOptions& options, cudaStream_t stream) {
  if (target.indices.nnz == 0) return cudaSuccess;
  return with_types(target.dtype, target.indices.type, [&](auto element, auto index) {
    using T = decltype(element);
    using I = decltype(index);
    SPRAND_LAUNCH((sparse_adamw_kernel<T, I>), entry_grid(target.indices.nnz), kEntryThreads, 0, stream,
                  static_cast<T*>(target.weight), static_cast<const I*>(target.indices.data), static_cast<const T*>(target.base),
                  target.delta, target.grad, target.exp_avg, target.exp_avg_sq, target.step, target.scale, options,
                  target.indices.nnz);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
