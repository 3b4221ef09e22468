// What the kernels over the entries of many targets share: four consecutive entries per thread, and the launch of a table.
#pragma once
#include "kernel.cuh"
#include "segments.h"

namespace sprand::cuda {

constexpr int kQuad = 4;
constexpr int kTurns = kChunk / (kQuad * kEntryThreads);  // a block takes its chunk in this many turns
static_assert(kTurns * kQuad * kEntryThreads == kChunk);

// Four consecutive values of what is stored per entry: one access of up to 16 bytes (two for int64).
template <class V>
struct alignas(kQuad * sizeof(V)) Quad {
  V value[kQuad];
};

template <class V>
__device__ __forceinline__ bool holds_quads(const V* p) {
  return (reinterpret_cast<uintptr_t>(p) & (alignof(Quad<V>) - 1)) == 0;
}

// The first `count` of four values, zero for the rest; nothing behind them is read. `p` may be unaligned: then one by one.
template <class V>
__device__ __forceinline__ Quad<V> load_quad(const V* p, int count) {
  if (count >= kQuad && holds_quads(p)) return *reinterpret_cast<const Quad<V>*>(p);
  Quad<V> q;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) q.value[k] = k < count ? p[k] : V{};
  return q;
}

template <class V>
__device__ __forceinline__ void store_quad(V* p, const Quad<V>& q, int count) {
  if (count >= kQuad && holds_quads(p)) {
    *reinterpret_cast<Quad<V>*>(p) = q;
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < count) p[k] = q.value[k];
}

// The entries of a thread in one turn of its block: the first of them in the segment, and how many (0 to 4) there are.
struct Turn {
  int64_t entry;
  int count;
};
template <class Segment>
__device__ __forceinline__ Turn turn_of(const Segment& segment, int turn) {
  const int64_t chunk = int64_t{blockIdx.x - segment.first_block} * kChunk;
  const int64_t entry = chunk + (turn * kEntryThreads + static_cast<int>(threadIdx.x)) * kQuad;
  const int64_t rest = segment.nnz - entry;
  return {entry, rest >= kQuad ? kQuad : rest > 0 ? static_cast<int>(rest) : 0};
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
