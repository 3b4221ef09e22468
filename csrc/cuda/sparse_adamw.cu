// sparse_adamw_: one AdamW step of all deltas (arXiv 1711.05101) and the patch of their weights, in one pass over memory.
//
// Contract: step, lr_tensor, grad_coef and found_inf are read here, from device memory; where found_inf is not zero nothing is
// written. Positions are unique, weights distinct. Grid: one block per chunk of a target's entries, all targets in one launch
// (segments.h). The first thread of a block computes, in double, what its entries share (bias corrections, step size) while the
// others wait for their first entries from memory, and hands it on through shared memory.
#include "../entry_math.h"
#include "entries.cuh"

namespace sprand::cuda {
namespace {

template <class T, class I, class Table>
__global__ void __launch_bounds__(kEntryThreads, 4)
    sparse_adamw_kernel(SPRAND_GRID_CONSTANT(Table) table, SPRAND_GRID_CONSTANT(AdamWOptions) options) {
  if (options.found_inf != nullptr && *options.found_inf != 0.f) return;  // the same for every thread
  const AdamWSegment& s = table.segments[segment_of(table, blockIdx.x)];
  T* const weight = static_cast<T*>(s.weight);
  __shared__ AdamW<float> shared;
#pragma unroll 1  // a turn's stores may alias the next one's loads: nothing to gain from both at once
  for (int i = 0; i < kTurns; ++i) {
    const Turn turn = turn_of(s, i);
    const Four<float> grad = load_four(s.grad, turn);
    Four<float> delta = load_four<float>(s.delta, turn);
    Four<float> m = load_four<float>(s.exp_avg, turn);
    Four<float> v = load_four<float>(s.exp_avg_sq, turn);
    if (i == 0) {
      if (threadIdx.x == 0) {
        const double lr = options.lr_tensor != nullptr ? double{*options.lr_tensor} : options.lr;
        const double coef = options.grad_coef != nullptr ? double{*options.grad_coef} : 1.0;
        shared = adamw_step<float>(lr, options.beta1, options.beta2, options.eps, options.weight_decay, double{*s.step},
                                   options.maximize ? -coef : coef);
      }
      __syncthreads();
    }
    const Four<int64_t> position = positions_of_four<I>(s, turn);
    Four<T> value = load_four(static_cast<const T*>(s.base), turn);
#pragma unroll
    for (int k = 0; k < kFour; ++k) delta.value[k] = adamw_entry(shared, delta.value[k], grad.value[k], m.value[k], v.value[k]);
    store_four(s.exp_avg, m, turn);
    store_four(s.exp_avg_sq, v, turn);
    store_four(s.delta, delta, turn);
#pragma unroll
    for (int k = 0; k < kFour; ++k) {
      if (changes(delta.value[k], s.scale))
        value.value[k] = from_float<T>(patched(to_float(value.value[k]), delta.value[k], s.scale));
      if (turn.has(k) && inside(position.value[k], s.numel)) weight[position.value[k]] = value.value[k];
    }
  }
}

}  // namespace

cudaError_t sparse_adamw(std::span<const Target<AdamWSegment>> targets, const AdamWOptions& options, cudaStream_t stream) {
  return for_each_table<false>(targets, [&](auto element, auto index, const auto& table, dim3 grid) {
    using Table = std::decay_t<decltype(table)>;
    SPRAND_LAUNCH((sparse_adamw_kernel<decltype(element), decltype(index), Table>), grid, kEntryThreads, 0, stream, table,
                  options);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
