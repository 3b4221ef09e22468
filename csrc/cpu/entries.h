// The CPU loops over chosen entries: gather, patch, scatter-add and the fused AdamW step. Raw pointers, one thread each.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../entry_math.h"
#include "../places.h"

namespace sprand::cpu {

// The sum dtype of a weight dtype: double for double, float for the rest.
template <class T>
struct SumOf {
  using type = float;
};
template <>
struct SumOf<double> {
  using type = double;
};
template <class T>
using Sum = typename SumOf<T>::type;

template <class T, class Index>
void gather(const T* weight, const Index* indices, T* out, int64_t n) {
  for (int64_t p = 0; p < n; ++p) out[p] = weight[indices[p]];
}

// f(offset, position, first, n) for stretches that together are the entries [begin, end): entry first + k is at
// offset + position(k).
template <class Index, class F>
void over_stretches(const Places& places, const Index* indices, int64_t begin, int64_t end, F&& f) {
  const int64_t run = places.run;
  for (int64_t row = begin / places.per_row, q = begin % places.per_row; begin < end; ++row, q = 0) {
    const int64_t offset = row * places.row_numel, stop = std::min(end, begin - q + places.per_row);
    if (run == 1) {
      f(offset, [index = indices + q](int64_t p) { return index[p]; }, begin, stop - begin);
      begin = stop;
      continue;
    }
    for (int64_t n; begin < stop; begin += n, q += n) {
      n = std::min(stop - begin, run - q % run);
      f(offset + indices[q / run] * run + q % run, [](int64_t p) { return p; }, begin, n);
    }
  }
}

// Entry p is at position(p); delta may be null: then base is put back.
template <class T, class Position>
void patch(T* weight, Position position, const T* base, const Sum<T>* delta, Sum<T> scale, int64_t n) {
  if (!delta) {
    for (int64_t p = 0; p < n; ++p) weight[position(p)] = base[p];
    return;
  }
  for (int64_t p = 0; p < n; ++p)
    weight[position(p)] =
        changes(delta[p], scale) ? static_cast<T>(patched(static_cast<Sum<T>>(base[p]), delta[p], scale)) : base[p];
}

template <class T, class Index>
void scatter_add(T* weight, const Index* indices, const Sum<T>* values, Sum<T> scale, int64_t n) {
  for (int64_t p = 0; p < n; ++p) {
    T& w = weight[indices[p]];
    if (changes(values[p], scale)) w = static_cast<T>(patched(static_cast<Sum<T>>(w), values[p], scale));
  }
}

// Moments and delta of n contiguous entries; compiled for several instruction sets.
void adamw(const AdamW<float>& a, float* delta, const float* grad, float* exp_avg, float* exp_avg_sq, int64_t n);
void adamw(const AdamW<double>& a, double* delta, const double* grad, double* exp_avg, double* exp_avg_sq, int64_t n);

}  // namespace sprand::cpu
