// What the kernels over the entries of many targets share: which entries a thread takes, and the launch of a table.
#pragma once
#include "kernel.cuh"
#include "segments.h"

namespace sprand::cuda {

constexpr int kFour = 4;                                  // entries of a thread at once: four misses in flight
constexpr int kTurns = kChunk / (kFour * kEntryThreads);  // a block takes its chunk in this many turns
static_assert(kTurns * kFour * kEntryThreads == kChunk);

// The entries of a thread in one turn of its block. Neighbouring lanes hold neighbouring entries, so that what is stored per
// entry moves in full lines, and an access of a warp to the weight meets as few lines as 32 neighbours of the pattern lie in.
struct Turn {
  int64_t first, rest;  // entry k is first + k * kEntryThreads, if that is below first + rest
  __device__ __forceinline__ bool has(int k) const { return k * kEntryThreads < rest; }
};
template <class Segment>
__device__ __forceinline__ Turn turn_of(const Segment& segment, int turn) {
  const int64_t chunk = int64_t{blockIdx.x - segment.first_block} * kChunk;
  const int64_t first = chunk + turn * kFour * kEntryThreads + static_cast<int>(threadIdx.x);
  return {first, segment.nnz - first};
}

template <class V>
struct Four {
  V value[kFour];
};

// The values of a thread's entries; for an entry that it has not, that of the last one: a branch around loads would make each
// wait for the one before. No segment is empty.
template <class V>
__device__ __forceinline__ Four<V> load_four(const V* p, const Turn& turn) {
  Four<V> four;
#pragma unroll
  for (int k = 0; k < kFour; ++k) {
    const int64_t ahead = k * kEntryThreads;
    four.value[k] = p[turn.first + (ahead < turn.rest ? ahead : turn.rest - 1)];
  }
  return four;
}

// The positions of a thread's entries, as load_four: those at flat indices, or in the columns that indices number.
template <class I, class Segment>
__device__ __forceinline__ Four<int64_t> positions_of_four(const Segment& segment, const Turn& turn) {
  const I* const indices = static_cast<const I*>(segment.indices);
  const Columns& columns = segment.columns;
  Four<int64_t> position;
  if (columns.per_row == 0) {
    const Four<I> flat = load_four(indices, turn);
#pragma unroll
    for (int k = 0; k < kFour; ++k) position.value[k] = flat.value[k];
    return position;
  }
#pragma unroll
  for (int k = 0; k < kFour; ++k) {
    const int64_t ahead = k * kEntryThreads, own = turn.first + (ahead < turn.rest ? ahead : turn.rest - 1);
    const uint32_t entry = columns.begin + static_cast<uint32_t>(own), row = entry / columns.per_row;
    const uint32_t in_row = entry - row * columns.per_row, column = in_row / columns.run;
    position.value[k] = row * columns.row_numel + int64_t{indices[column]} * columns.run + (in_row - column * columns.run);
  }
  return position;
}

template <class V>
__device__ __forceinline__ void store_four(V* p, const Four<V>& four, const Turn& turn) {
#pragma unroll
  for (int k = 0; k < kFour; ++k)
    if (turn.has(k)) p[turn.first + k * kEntryThreads] = four.value[k];
}

template <int kCapacity, class Segment, class F>
cudaError_t with_table(const Batch& batch, std::span<const Target<Segment>> targets, F&& f) {
  Table<Segment, kCapacity> table;
  fill(table, batch, targets);
  return with_types(batch.dtype, batch.index_type, [&](auto element, auto index) {
    return f(element, index, std::as_const(table), dim3(static_cast<unsigned>(batch.blocks)));
  });
}

// f(element, index, table, grid) for each launch that the targets need: values of the C++ types of weight and indices, the
// table, and one block per chunk. With kOne a single target travels in a table of one: its launch costs no more than a plain one.
template <bool kOne, class Segment, class F>
cudaError_t for_each_table(std::span<const Target<Segment>> targets, F&& f) {
  constexpr int kMost = kMostSegments<Segment>, kLeast = kOne ? 1 : kMost;
  for (const Batch& batch : batches_of(targets)) {
    const cudaError_t error =
        batch.pieces.size() == 1 ? with_table<kLeast>(batch, targets, f) : with_table<kMost>(batch, targets, f);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace sprand::cuda
