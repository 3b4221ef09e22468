// Where the chosen entries of a weight are, written once for CPU and CUDA.
#pragma once
#include <cstdint>

namespace sprand {

// A weight is rows of `row_numel` entries, and each row holds `per_row` of the `nnz` chosen ones: an index stands for `run`
// neighbours. Of flat indices all is one row, and each stands for one entry.
struct Places {
  int64_t nnz, per_row, row_numel, run;
};

}  // namespace sprand
