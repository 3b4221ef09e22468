// sddmm_run8.cu: sddmm for patterns of runs of 8 adjacent columns, on tensor cores; raw pointers in, the launch error out.
#pragma once
#include "launch.h"

namespace sprand::cuda {

// What sprand/kernels/schedule_run8.py makes of a pattern, once. `table` is `table_size` int32 in device memory, aligned to 16
// bytes:
//   units + 1 times {row_begin, column_begin, columns, first_tile}, where the last holds first_tile = tiles and else zeros;
//   tiles times 16 runs: entries 8 run .. 8 run + 7 are row i of the tile, -1 where it has none;
//   tiles times 16 places of rows as int16;
//   tiles times one column group, (column - column_begin) / 8;
//   units times rows / 16 turns: shared memory holds row r of 16 rows (relative to row_begin) at place r ^ turn, turn below 8.
// `shape` is the block shape that the table was made for, `rows` the rows of the weight per row block, `processors` the number
// of blocks that the device runs at once.
struct Run8Schedule {
  const int32_t* table;
  int64_t table_size;
  int64_t shape, rows, units, tiles, processors;
};

// The parts into which the tokens are split: 1 for nnz = 0. A fact of sizes and schedule only, which
// sprand/kernels/cost_model.py knows, too.
int64_t sddmm_run8_splits(int64_t tokens, const Run8Schedule& schedule, int64_t nnz);

// out [nnz], for grad_output [tokens, out_features] and input [tokens, in_features] of `dtype`, both contiguous, input aligned to
// 16 bytes. `partial` holds [splits, nnz] floats and is not touched where that is one split. cudaErrorNotSupported for float32,
// cudaErrorMisalignedAddress for an input or a table that is not aligned, cudaErrorInvalidValue for sizes that no run8 pattern
// has or that are not those of the table.
cudaError_t sddmm_run8(const void* grad_output, const void* input, DType dtype, const Run8Schedule& schedule, float* out,
                       float* partial, int64_t tokens, int64_t out_features, int64_t in_features, int64_t nnz,
                       cudaStream_t stream);

}  // namespace sprand::cuda
