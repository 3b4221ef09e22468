// patch_, patch_all_: weight.flat[indices[p]] = cast(base[p] + scale * delta[p]), or the bits of base where nothing is added.
//
// Contract: set from base, never added to what the weight holds, so any number of calls ends in the same bits, and a target
// without delta gets its base back. Positions are unique, weights distinct: every store has one writer. Grid: one block per chunk
// of a target's entries, all targets in one launch (segments.h).
#include "../entry_math.h"
#include "entries.cuh"

namespace sprand::cuda {
namespace {

template <class T, class I, class Table>
__global__ void __launch_bounds__(kEntryThreads) patch_kernel(SPRAND_GRID_CONSTANT(Table) table) {
  const auto& s = table.segments[segment_of(table, blockIdx.x)];
  T* const weight = static_cast<T*>(s.weight);
#pragma unroll 1  // a turn's stores may alias the next one's loads: nothing to gain from both at once
  for (int i = 0; i < kTurns; ++i) {
    const Turn turn = turn_of(s, i);
    const Four<int64_t> position = positions_of_four<I>(s, turn);
    Four<T> value = load_four(static_cast<const T*>(s.base), turn);
    if (s.delta != nullptr) {
      const Four<float> delta = load_four(s.delta, turn);
#pragma unroll
      for (int k = 0; k < kFour; ++k)
        if (changes(delta.value[k], s.scale))
          value.value[k] = from_float<T>(patched(to_float(value.value[k]), delta.value[k], s.scale));
    }
#pragma unroll
    for (int k = 0; k < kFour; ++k)
      if (turn.has(k) && inside(position.value[k], s.numel)) weight[position.value[k]] = value.value[k];
  }
}

}  // namespace

cudaError_t patch(std::span<const Target<PatchSegment>> targets, cudaStream_t stream) {
  return for_each_table<true>(targets, [&](auto element, auto index, const auto& table, dim3 grid) {
    using Table = std::decay_t<decltype(table)>;
    SPRAND_LAUNCH((patch_kernel<decltype(element), decltype(index), Table>), grid, kEntryThreads, 0, stream, table);
    return cudaGetLastError();
  });
}

}  // namespace sprand::cuda
