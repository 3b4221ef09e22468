// What the embedding gradient shares between CPU and CUDA: how its sums are grouped, which tokens count, and bisection.
#pragma once
#include "pattern_math.h"

namespace sprand {

// The tokens of one row are added up in groups of this many, in their order, and the groups in theirs. A sum thus depends on the
// tokens of its own row alone, and is the same bits on every device and for any number of threads.
constexpr int64_t kTokenGroup = 32;

// Whether a token is a row that can have chosen entries; `last` is the last position. False for what is outside the vocabulary.
SPRAND_HD bool is_trained_row(int64_t token, int64_t last, int64_t features, int64_t padding) {
  return token >= 0 && token <= last / features && token != padding;
}

// The column of an entry of the row that starts at `row_start`. Positions that do not ascend can bring one of another row here:
// its sum is then wrong, but nothing outside of grad_output is read.
SPRAND_HD int64_t column_of(int64_t position, int64_t row_start, int64_t features) {
  const int64_t column = position - row_start;
  return column >= 0 && column < features ? column : 0;
}

// The first of the ascending values[begin, end) that is not below `key`; `end` where all are.
template <class T>
SPRAND_HD int64_t first_not_below(const T* values, int64_t begin, int64_t end, int64_t key) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (values[middle] < key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

// The first of the ascending values[begin, end) that is above `key`; `end` where none is.
template <class T>
SPRAND_HD int64_t first_above(const T* values, int64_t begin, int64_t end, int64_t key) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (values[middle] <= key)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

}  // namespace sprand
