// The compiled variants of the row kernel: {threads, rows per lane, slots, columns, unit, ordered}, mirrored in
// sprand/kernels/schedule.py.
//
// rows_per_lane * slots sums, a tile of input and the operands at hand fill the 255 registers of a lane without spilling.
// Variants of 64 sums and 2,048 columns fit into 99 KB of shared memory, the limit of sm_86, sm_89 and sm_120; all fit into the
// 163 KB of sm_80.
#pragma once
#include "sddmm_rows.cuh"

namespace sprand::cuda {

// clang-format off
#define SPRAND_ROWS_BF16 \
  RowsVariant{256, 8, 2, 4096, 1, false}, RowsVariant{256, 8, 5, 4096, 1, false}, \
  RowsVariant{256, 4, 5, 4096, 1, false}, RowsVariant{256, 8, 4, 2048, 1, false}, \
  RowsVariant{256, 8, 8, 2048, 1, false}, RowsVariant{256, 8, 11, 2560, 1, false}, \
  RowsVariant{256, 4, 11, 2560, 1, false}, RowsVariant{256, 4, 16, 2048, 1, false}, \
  RowsVariant{256, 4, 21, 2560, 1, false}, RowsVariant{256, 8, 4, 2048, 2, false}, \
  RowsVariant{256, 8, 11, 2560, 2, false}, RowsVariant{256, 8, 4, 2048, 4, false}, \
  RowsVariant{256, 4, 11, 2560, 4, false}, RowsVariant{256, 8, 8, 2048, 1, true}
#define SPRAND_ROWS_F16 \
  RowsVariant{256, 8, 2, 4096, 1, false}, RowsVariant{256, 8, 5, 4096, 1, false}, \
  RowsVariant{256, 8, 8, 2048, 1, false}, RowsVariant{256, 8, 11, 2560, 1, false}, \
  RowsVariant{256, 4, 11, 2560, 1, false}, RowsVariant{256, 4, 21, 2560, 1, false}, \
  RowsVariant{256, 8, 11, 2560, 2, false}, RowsVariant{256, 4, 11, 2560, 4, false}, \
  RowsVariant{256, 8, 8, 2048, 1, true}
#define SPRAND_ROWS_F32 \
  RowsVariant{256, 8, 2, 4096, 1, false}, RowsVariant{256, 8, 8, 2048, 1, false}, \
  RowsVariant{256, 8, 11, 2560, 1, false}, RowsVariant{256, 4, 11, 2560, 1, false}, \
  RowsVariant{256, 8, 8, 2048, 1, true}
// clang-format on

}  // namespace sprand::cuda
