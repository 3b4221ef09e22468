// scatter_add_all_: weight.flat[indices[p]] = cast(weight.flat[indices[p]] + scale * values[p]), rounded once.
//
// Contract: positions are unique and weights distinct, so every entry has one reader and one writer and no atomics are needed; an
// entry to which nothing is added keeps its bits. Grid: one block per chunk of a target's entries, all targets in one launch
// (segments.h).
#include "../entry_math.h"
#include "entries.cuh"

namespace sprand::cuda {
namespace {

template <class T, class I, class Table>
__global__ void __launch_bounds__(kEntryThreads) scatter_add_kernel(SPRAND_GRID_CONSTANT(Table) table) {
  const auto& s = table.segments[segment_of(table, blockIdx.x)];
  T* const weight = static_cast<T*>(s.weight);
#pragma unroll 1  // a turn's stores may alias the next one's loads: nothing to gain from both at once
  for (int i = 0; i < kTurns; ++i) {
    const Turn turn = turn_of(s, i);
    const Four<I> position = load_four(static_cast<const I*>(s.indices), turn);
    const Four<float> added = load_four(s.values, turn);
    bool written[kFour];
    T value[kFour] = {};
#pragma unroll
    for (int k = 0; k < kFour; ++k) {  // all loads first: four misses at a time
      written[k] = turn.has(k) && changes(added.value[k], s.scale) && inside(position.value[k], s.numel);
      if (written[k]) value[k] = weight[position.value[k]];
    }
#pragma unroll
    for (int k = 0; k < kFour; ++k)
      if (written[k]) weight[position.value[k]] = from_float<T>(patched(to_float(value[k]), added.value[k], s.scale));
  }
}

}  // namespace

cudaError_t scatter_add(std::span<const Target<ScatterAddSegment>> targets, cudaStream_t stream) {
  return for_each_table<true>(targets, [&](auto element, auto index, const auto& table, dim3 grid) {
    using Table = std::decay_t<decltype(table)>;
    SPRAND_LAUNCH((scatter_add_kernel<decltype(element), decltype(index), Table>), grid, kEntryThreads, 0, stream, table);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
