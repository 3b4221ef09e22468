// Tests of the launch arithmetic of the row kernel of sddmm (csrc/cuda/sddmm_rows.h): table and workspace sizes, splits.
#include <string>

#include "../cuda/sddmm_rows.h"
#include "expect.h"

namespace {

using namespace sprand::cuda;
using tests::expect;

RowsPlan plan(int64_t tiles, int64_t windows, bool ordered = false) {
  return {{256, 8, 11, 2560, 1, ordered}, nullptr, tiles, windows, 11, 2500, 132};
}

void tables() {
  expect(rows_table_size(plan(2, 2), 4096) == 4096 + 1 + 2, "an aligned table: row starts and windows");
  expect(rows_table_size(plan(3, 1, true), 4096) == 3 + 3 * 2048 * (1 + 11), "an ordered table: windows, rows, entries");
  const int64_t many = int64_t{1} << 20;  // tiles: more than 2^31 slots
  expect(rows_table_size(plan(many, 1, true), 4096) == many + many * 2048 * 12, "a table beyond 2^31 entries");
}

void shared_memory() {
  const RowsVariant small{256, 8, 8, 2048, 1, false}, large{256, 4, 21, 2560, 1, false}, paired{256, 8, 11, 2560, 2, false};
  expect(rows_shared_bytes(small) == 2 * 2048 * 16 + 64 * 2 * 256, "two stages and the offsets of 64 slots");
  expect(rows_shared_bytes(small) <= 99 * 1024, "fits into the 99 KB of sm_86");
  expect(rows_shared_bytes(large) == 2 * 2560 * 16 + 88 * 2 * 256, "84 slots take the place of 88");
  expect(rows_shared_bytes(paired) == 2 * 2560 * 16 + 48 * 2 * 256, "rows that share columns share offsets");
}

void splits() {
  expect(rows_splits(plan(2, 2), 8192) == 33, "four blocks leave room for 33 splits");
  expect(rows_splits(plan(14, 10), 8192) == 1, "more blocks than multiprocessors: no split");
  expect(rows_splits(plan(1, 1), 0) == 1 && rows_splits(plan(1, 1), 63) == 1, "few tokens are not split");
  expect(rows_splits(plan(1, 1), 640) == 10, "a split has at least 64 tokens");
  for (int64_t tokens = 0; tokens < 5000; tokens += 7) {
    const int64_t whole = tokens / kRowsGranule * kRowsGranule, parts = rows_splits(plan(2, 1), whole);
    const int64_t each = rows_split_tokens(whole, parts);
    expect(each % kRowsGranule == 0 && each * parts >= whole,
           "the splits cover " + std::to_string(whole) + " tokens in whole granules");
  }
  const int64_t long_text = int64_t{1} << 40;
  expect(rows_split_tokens(long_text, rows_splits(plan(2, 1), long_text)) * 66 >= long_text, "tokens beyond 2^31");
}

}  // namespace

int main() {
  tables();
  shared_memory();
  splits();
  return tests::finish();
}
