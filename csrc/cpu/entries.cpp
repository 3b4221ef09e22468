// The vectorised AdamW arithmetic of the CPU, one clone per instruction set, chosen when the library is loaded.
#include "entries.h"

// target_clones needs ifunc (GCC on Linux) and does not go with the sanitizers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__) && \
    !defined(__SANITIZE_THREAD__)
#define SPRAND_MULTIVERSION __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define SPRAND_MULTIVERSION
#endif

namespace sprand::cpu {

SPRAND_MULTIVERSION
void adamw(const AdamW<float>& a, float* __restrict delta, const float* __restrict grad, float* __restrict exp_avg,
           float* __restrict exp_avg_sq, int64_t n) {
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) delta[p] = adamw_entry(a, delta[p], grad[p], exp_avg[p], exp_avg_sq[p]);
}

SPRAND_MULTIVERSION
void adamw(const AdamW<double>& a, double* __restrict delta, const double* __restrict grad, double* __restrict exp_avg,
           double* __restrict exp_avg_sq, int64_t n) {
#pragma omp simd
  for (int64_t p = 0; p < n; ++p) delta[p] = adamw_entry(a, delta[p], grad[p], exp_avg[p], exp_avg_sq[p]);
}

}  // namespace sprand::cpu
