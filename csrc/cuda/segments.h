// One launch for many targets: which targets share a launch, which of its blocks work on which target. Plain C++.
//
// A launch covers the targets of one weight dtype and one index dtype. Their pointers travel by value, in a table that is a
// kernel parameter: no copy to the device, nothing to keep alive until a captured graph is replayed. Target after target takes as
// many blocks as it has chunks of entries; a block finds its target by bisection over the first blocks.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "../pattern_math.h"
#include "types.h"

namespace sprand::cuda {

constexpr int64_t kChunk = 2048;                         // entries of one block, a multiple of 4
constexpr int64_t kMostBlocks = (int64_t{1} << 31) - 1;  // of gridDim.x
constexpr size_t kTableBytes = 32000;                    // of the 32,764 bytes of parameters of a kernel (CUDA 12.1, sm_70)

// Where entries in whole columns are (places.h), in 32 bits, by which a GPU divides fast. Flat indices have none: per_row is 0.
struct Columns {
  uint32_t per_row = 0, run = 0;
  uint32_t begin = 0;  // the first entry of a piece
  int64_t row_numel = 0;
};

// A target in a table: pointers to its entries, how many there are, and the first of its blocks. Without `delta` a patch puts
// the base back.
struct PatchSegment {
  void* weight;
  const void* indices;
  const void* base;
  const float* delta;
  Columns columns;
  int64_t nnz;
  int64_t numel;  // entries of the weight; an index outside of it is not followed
  float scale;
  uint32_t first_block;
};

struct ScatterAddSegment {
  void* weight;
  const void* indices;
  const float* values;
  int64_t nnz;
  int64_t numel;  // entries of the weight; an index outside of it is not followed
  float scale;
  uint32_t first_block;
};

// `step` is one float, counting this step already.
struct AdamWSegment {
  void* weight;
  const void* indices;
  const void* base;
  float* delta;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const float* step;
  Columns columns;
  int64_t nnz;
  int64_t numel;  // entries of the weight; an index outside of it is not followed
  float scale;
  uint32_t first_block;
};

template <class Segment>
struct Target {
  Segment segment;  // its first_block is set when it is placed
  DType dtype;
  IndexType index_type;
};

template <class Segment, int kCapacity>
struct Table {
  using SegmentType = Segment;
  int32_t count;
  Segment segments[kCapacity];
};

template <class Segment>
constexpr int kMostSegments = static_cast<int>((kTableBytes - sizeof(int64_t)) / sizeof(Segment));

// The segment that a block of the launch works on: the last one whose first block is not behind it. No segment is empty.
template <class Table>
SPRAND_HD int segment_of(const Table& table, uint32_t block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.segments[middle].first_block <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Entries [begin, begin + nnz) of a target, in the blocks from first_block on.
struct Piece {
  size_t target;
  int64_t begin, nnz;
  uint32_t first_block;
};

// One launch.
struct Batch {
  DType dtype;
  IndexType index_type;
  int64_t blocks = 0;
  std::vector<Piece> pieces = {};
};

// Launches of at most `capacity` pieces and `most_blocks` blocks; empty targets take part in none. A target is cut in pieces only
// where its blocks do not fit into one launch.
template <class Segment>
std::vector<Batch> batches_of(std::span<const Target<Segment>> targets, size_t capacity = kMostSegments<Segment>,
                              int64_t most_blocks = kMostBlocks) {
  constexpr size_t kNone = ~size_t{0};
  std::vector<Batch> batches;
  std::array<size_t, 6> open;  // for each pair of types the batch that takes its next piece
  open.fill(kNone);
  for (size_t i = 0; i < targets.size(); ++i) {
    const auto& [segment, dtype, index_type] = targets[i];
    size_t& current = open[2 * static_cast<size_t>(dtype) + static_cast<size_t>(index_type)];
    for (int64_t begin = 0; begin < segment.nnz;) {
      if (current == kNone || batches[current].pieces.size() == capacity || batches[current].blocks == most_blocks) {
        current = batches.size();
        batches.push_back({dtype, index_type});
      }
      Batch& batch = batches[current];
      const int64_t rest = segment.nnz - begin, room = (most_blocks - batch.blocks) * kChunk;
      const int64_t nnz = rest < room ? rest : room;
      batch.pieces.push_back({i, begin, nnz, static_cast<uint32_t>(batch.blocks)});
      batch.blocks += (nnz - 1) / kChunk + 1;
      begin += nnz;
    }
  }
  return batches;
}

template <class P>
P* advanced(P* pointer, int64_t bytes) {
  return pointer == nullptr ? nullptr : reinterpret_cast<P*>(reinterpret_cast<uintptr_t>(pointer) + bytes);
}

template <class Segment>
void advance_indices(Segment& s, int64_t entries, int64_t index_bytes) {
  if constexpr (requires { s.columns; })
    if (s.columns.per_row != 0) {
      s.columns.begin = static_cast<uint32_t>(entries);
      return;
    }
  s.indices = advanced(s.indices, entries * index_bytes);
}

inline void advance(PatchSegment& s, int64_t entries, int64_t element_bytes) {
  s.base = advanced(s.base, entries * element_bytes);
  s.delta = advanced(s.delta, entries * 4);
}
inline void advance(ScatterAddSegment& s, int64_t entries, int64_t) { s.values = advanced(s.values, entries * 4); }
inline void advance(AdamWSegment& s, int64_t entries, int64_t element_bytes) {
  s.base = advanced(s.base, entries * element_bytes);
  s.delta = advanced(s.delta, entries * 4);
  s.grad = advanced(s.grad, entries * 4);
  s.exp_avg = advanced(s.exp_avg, entries * 4);
  s.exp_avg_sq = advanced(s.exp_avg_sq, entries * 4);
}

// Fills a table with the pieces of one launch.
template <class Segment, int kCapacity>
void fill(Table<Segment, kCapacity>& table, const Batch& batch, std::span<const Target<Segment>> targets) {
  table.count = static_cast<int32_t>(batch.pieces.size());
  for (size_t i = 0; i < batch.pieces.size(); ++i) {
    const Piece& piece = batch.pieces[i];
    Segment& s = table.segments[i] = targets[piece.target].segment;
    advance(s, piece.begin, size_of(batch.dtype));
    advance_indices(s, piece.begin, size_of(batch.index_type));
    s.nnz = piece.nnz;
    s.first_block = piece.first_block;
  }
}

}  // namespace sprand::cuda
