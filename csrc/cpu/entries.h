// The CPU loops over chosen entries: gather, patch, scatter-add and the fused AdamW step. Raw pointers, one thread each.
#pragma once
#include <cstdint>

#include "../entry_math.h"

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

// delta may be null: then base is put back.
template <class T, class Index>
void patch(T* weight, const Index* indices, const T* base, const Sum<T>* delta, Sum<T> scale, int64_t n) {
  if (!delta) {
    for (int64_t p = 0; p < n; ++p) weight[indices[p]] = base[p];
    return;
  }
  for (int64_t p = 0; p < n; ++p)
    weight[indices[p]] =
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
