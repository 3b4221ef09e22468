// The random positions, written once for host and device: the same draw on every CPU, GPU, rank and torch version.
//
// Stratified: row r carries q or q+1 of the nnz entries; which rows carry one more is itself a stratified draw, so the
// count is exact. A row's columns are cut into granules of 8 (of 1 where 8 does not divide cols or the row is too
// dense), its granules into as many strata as it has entries, the whole turned by a hash of the row, so that every
// entry of the matrix is drawn with the same probability. One entry falls into each stratum. The column inside the
// granule is (row / 2 mod 8) XOR a hash of (row / 16, rank): eight lanes that hold rows 16j, 16j+2, ..., 16j+14 at the
// same rank meet eight different shared-memory bank groups.
//
// Stratified runs: the same draw on the matrix of runs, each expanded to run_rows x run_cols adjacent entries. A lane that
// takes a run of several rows owns one row of that matrix, so the residue is (row mod 8) XOR a hash of (row / 8, rank);
// runs of several columns fill whole bank groups by themselves, and are drawn with granule 1.
//
// Uniform: a keyed Feistel permutation of [0, numel), cycle-walked; entry p is the image of p.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define SPRAND_HD __host__ __device__ __forceinline__
#else
#define SPRAND_HD inline
#endif

namespace sprand {

// Streams of the counter-based hash; a change of any constant here is a new pattern version.
enum HashStream : uint32_t {
  kEntry = 0x243F6A88u,
  kRowTurn = 0x85A308D3u,
  kExtraRow = 0x13198A2Eu,
  kExtraTurn = 0x03707344u,
  kResidue = 0xA4093822u,
  kFeistel = 0x299F31D0u
};

SPRAND_HD uint32_t mix32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  x ^= x >> 16;
  return x;
}

SPRAND_HD uint32_t hash(uint64_t key, HashStream stream, uint32_t a, uint32_t b) {
  uint32_t h = mix32((uint32_t)key ^ (uint32_t)stream);
  h = mix32(h + (uint32_t)(key >> 32));
  h = mix32(h ^ a);
  return mix32(h + 0x9E3779B9u * b);
}

// floor(h / 2^32 * n), the hash as a number in [0, n); n <= 2^32.
SPRAND_HD uint64_t below(uint32_t h, uint64_t n) { return (uint64_t)(((uint64_t)h * (n & 0xFFFFFFFFu)) >> 32) + (n >> 32) * h; }

// One position in each of `parts` strata of [0, size), before the turn.
struct Strata {
  uint64_t size, parts;
  SPRAND_HD uint64_t begin(uint64_t s) const { return s * size / parts; }
  SPRAND_HD uint64_t stratum_of(uint64_t x) const { return ((x + 1) * parts - 1) / size; }
  SPRAND_HD uint64_t position(uint64_t s, uint32_t h) const { return begin(s) + below(h, begin(s + 1) - begin(s)); }
};

struct Stratified {
  uint64_t run_rows, run_cols;
  uint64_t rows, cols, key;    // of the matrix of runs; below, a row is one of its rows
  uint64_t q, extra;           // every row has q runs, `extra` rows one more
  uint64_t granule, granules;  // columns per granule, granules per row
  uint64_t row_shift;          // a lane owns 2^row_shift rows
  uint64_t extra_turn;

  // A draw of nnz entries of [rows, cols], in runs that divide all three.
  SPRAND_HD Stratified(uint64_t rows_, uint64_t cols_, uint64_t nnz, uint64_t key_, uint64_t run_rows_ = 1,
                       uint64_t run_cols_ = 1)
      : run_rows(run_rows_), run_cols(run_cols_), rows(rows_ / run_rows_), cols(cols_ / run_cols_), key(key_) {
    uint64_t runs = nnz / run_size();
    q = rows ? runs / rows : 0;
    extra = rows ? runs % rows : 0;
    uint64_t most = q + (extra ? 1 : 0);
    granule = run_cols == 1 && cols % 8 == 0 && most * 8 <= cols ? 8 : 1;
    granules = cols / granule;
    row_shift = run_rows == 1 ? 1 : 0;
    extra_turn = below(hash(key, kExtraTurn, 0, 0), rows);
  }

  SPRAND_HD uint64_t run_size() const { return run_rows * run_cols; }

  // Rows with one more run among the first x rows of the unturned order.
  SPRAND_HD uint64_t extra_below(uint64_t x) const {
    if (extra == 0 || x == 0) return 0;
    if (x >= rows) return extra;
    Strata strata{rows, extra};
    uint64_t j = strata.stratum_of(x);
    return j + (strata.position(j, hash(key, kExtraRow, (uint32_t)j, 0)) < x ? 1 : 0);
  }

  // Number of runs in rows [0, r), r <= rows.
  SPRAND_HD uint64_t row_begin(uint64_t r) const {
    uint64_t first = extra_turn ? rows - extra_turn : 0;  // unturned position of row 0
    uint64_t before = first + r <= rows ? extra_below(first + r) - extra_below(first)
                                        : extra - extra_below(first) + extra_below(first + r - rows);
    return q * r + before;
  }

  // Number of entries in rows [0, r), r <= rows.
  SPRAND_HD uint64_t entries_before(uint64_t r) const { return row_begin(r) * run_size(); }

  // The row of entry p: the last r with entries_before(r) <= p that is not empty behind it.
  SPRAND_HD uint64_t row_of(uint64_t p) const {
    p /= run_size();
    uint64_t lo = 0, hi = rows;  // row_begin(lo) <= p < row_begin(hi)
    while (hi - lo > 1) {
      uint64_t mid = lo + (hi - lo) / 2;
      if (row_begin(mid) <= p)
        lo = mid;
      else
        hi = mid;
    }
    return lo;
  }

  // Column of the run of ascending rank `rank` among the n runs of row r.
  SPRAND_HD uint64_t column(uint64_t r, uint64_t n, uint64_t rank) const {
    Strata strata{granules, n};
    uint64_t turn = below(hash(key, kRowTurn, (uint32_t)r, 0), granules);
    uint64_t edge = granules - turn;  // unturned positions from here on wrap to the front
    uint64_t stay = n;                // strata 0 .. stay-1 do not wrap
    if (edge < granules) {
      uint64_t s = strata.stratum_of(edge);
      stay = s + (strata.position(s, hash(key, kEntry, (uint32_t)r, (uint32_t)s)) < edge ? 1 : 0);
    }
    uint64_t wrapped = n - stay;
    uint64_t s = rank < wrapped ? rank + stay : rank - wrapped;
    uint64_t x = strata.position(s, hash(key, kEntry, (uint32_t)r, (uint32_t)s)) + turn;
    if (x >= granules) x -= granules;
    uint64_t residue =
        granule == 8 ? ((r >> row_shift) & 7) ^ (hash(key, kResidue, (uint32_t)(r >> (row_shift + 3)), (uint32_t)rank) & 7) : 0;
    return x * granule + residue;
  }

  // Flat position of entry `at` among the `count` entries of row r.
  SPRAND_HD uint64_t position(uint64_t r, uint64_t count, uint64_t at) const {
    uint64_t in_line = count / run_rows;  // entries of one of the run_rows rows of the weight
    uint64_t line = at / in_line, rank = at % in_line / run_cols;
    return ((r * run_rows + line) * cols + column(r, in_line / run_cols, rank)) * run_cols + at % run_cols;
  }
};

// Entry p of the keyed permutation of [0, numel).
SPRAND_HD uint64_t uniform_entry(uint64_t numel, uint64_t key, uint64_t p) {
  int half = 1;
  while (half < 31 && (1ull << (2 * half)) < numel) ++half;
  const uint32_t mask = (uint32_t)((1ull << half) - 1);
  do {
    uint32_t left = (uint32_t)(p >> half) & mask, right = (uint32_t)p & mask;
    for (uint32_t round = 0; round < 6; ++round) {
      uint32_t next = left ^ (hash(key, kFeistel, right, round) & mask);
      left = right;
      right = next;
    }
    p = ((uint64_t)left << half) | right;
  } while (p >= numel);
  return p;
}

}  // namespace sprand
