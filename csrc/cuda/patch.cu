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
  for (int turn = 0; turn < kTurns; ++turn) {
    const auto [entry, count] = turn_of(s, turn);
    const Quad<I> position = load_quad(static_cast<const I*>(s.indices) + entry, count);
    Quad<T> value = load_quad(static_cast<const T*>(s.base) + entry, count);
    if (s.delta != nullptr) {
      const Quad<float> delta = load_quad(s.delta + entry, count);
#pragma unroll
      for (int k = 0; k < kQuad; ++k)
        if (changes(delta.value[k], s.scale))
          value.value[k] = from_float<T>(patched(to_float(value.value[k]), delta.value[k], s.scale));
    }
#pragma unroll
    for (int k = 0; k < kQuad; ++k)
      if (k < count && inside(position.value[k], s.numel)) weight[position.value[k]] = value.value[k];
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
