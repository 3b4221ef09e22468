// The row kernel of sddmm: its instantiations, the plan of a launch, and the launcher.
//
// A plan is made once per pattern (sprand/kernels/schedule.py). `table` holds int32 in device memory:
//   aligned:  row_begin [out + 1], the number of entries before each row; window_begin [windows], first column of each window
//   ordered:  window_begin [tiles]; rows [tiles, rows_per_lane, threads]; entries [tiles, rows_per_lane * slots, threads],
//             -1 where a lane has no such row or slot
#pragma once
#include "launch.h"

namespace sprand::cuda {

// One instantiation: `threads` lanes own `rows_per_lane` rows each, with `slots` sums per row and window of at most `columns`
// columns; `unit` neighbouring rows share their columns.
struct RowsVariant {
  int threads, rows_per_lane, slots, columns, unit;
  bool ordered;
  bool operator==(const RowsVariant&) const = default;
};

struct RowsPlan {
  RowsVariant variant;
  const int32_t* table;
  int64_t tiles;    // blocks of rows
  int64_t windows;  // of columns, met by each block of rows; 1 if ordered, where each tile has its own
  int64_t ranks;    // entries of a row that one window serves, at most `slots`
  int64_t width;    // columns of the widest window
  int64_t blocks;   // wanted at once: the number of multiprocessors
};

// Entries of `table`; launching with fewer reads out of bounds.
inline int64_t rows_table_size(const RowsPlan& plan, int64_t out_features) {
  const RowsVariant& v = plan.variant;
  const int64_t lanes = plan.tiles * v.threads * v.rows_per_lane;
  return v.ordered ? plan.tiles + lanes * (1 + v.slots) : out_features + 1 + plan.windows;
}

inline int64_t rows_shared_bytes(const RowsVariant& v) {
  const int64_t offsets = (v.rows_per_lane / v.unit * v.slots + 7) / 8 * 8;
  return 2 * int64_t{v.columns} * 16 + offsets * 2 * v.threads;
}

// Parts of the tokens, each with its own blocks and partial sums: as many as the plan's blocks leave multiprocessors idle.
// sprand/kernels/cost_model.py counts them in the same way.
inline int64_t rows_splits(const RowsPlan& plan, int64_t tokens) {
  constexpr int64_t kFewestTokens = 64;
  const int64_t blocks = plan.tiles * plan.windows, useful = tokens / kFewestTokens;
  const int64_t splits = blocks < plan.blocks ? plan.blocks / blocks : 1;
  return splits < useful ? splits : useful > 1 ? useful : 1;
}

constexpr int64_t kRowsGranule = 8;  // tokens; fewer at the end go through the kernel for any shape

// Whether the loads of the kernel suit these shapes and addresses; where they do not, the kernel for any shape serves.
bool rows_fit(const RowsVariant& variant, const void* grad_output, const void* input, int64_t out_features, int64_t in_features);

// Tokens of a split, in whole granules; the last splits may hold fewer or none.
inline int64_t rows_split_tokens(int64_t tokens, int64_t splits) {
  return ((tokens + splits - 1) / splits + kRowsGranule - 1) / kRowsGranule * kRowsGranule;
}

// Whether there is a kernel for this variant and dtype.
bool has_rows_variant(const RowsVariant& variant, DType dtype);

// out[p] = sum over t of grad_output[t, row p] * input[t, column p]; `partial` holds [rows_splits, nnz] floats, and is not
// touched where that is one split. Needs rows_fit. cudaErrorInvalidValue for a variant without a kernel.
cudaError_t sddmm_rows(const void* grad_output, const void* input, DType dtype, Indices indices, const RowsPlan& plan, float* out,
                       float* partial, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream);

}  // namespace sprand::cuda
