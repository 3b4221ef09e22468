// The formulas of one chosen entry, written once for CPU and CUDA: the patched value and the AdamW update.
#pragma once
#include <cmath>

#include "pattern_math.h"

namespace sprand {

// base + scale * delta with the product rounded before the sum, so that every device gives the same bits.
// Callers write the stored bits of base instead where `changes` says there is nothing to add (this keeps -0.0).
SPRAND_HD float patched(float base, float delta, float scale) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(base, __fmul_rn(scale, delta));
#else
  return base + scale * delta;  // built with -ffp-contract=off
#endif
}
SPRAND_HD double patched(double base, double delta, double scale) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(base, __dmul_rn(scale, delta));
#else
  return base + scale * delta;
#endif
}
template <class F>
SPRAND_HD bool changes(F delta, F scale) {
  return scale * delta != F(0);
}

// What one AdamW step needs beside the entry itself, the same for all entries of a target.
template <class F>
struct AdamW {
  F beta1, beta2, rest1, rest2;  // rest = 1 - beta
  F eps, decay;                  // decay = 1 - lr * weight_decay
  F step_size;                   // lr / (1 - beta1^step)
  F inv_sqrt_bias2;              // 1 / sqrt(1 - beta2^step)
  F grad_coef;                   // factor on the gradient; negative to maximize
};

// From the options of the step, in double: 1 - float(0.999) is off by 1e-5, 1 - 0.999 rounded once is not.
template <class F>
SPRAND_HD AdamW<F> adamw_step(double lr, double beta1, double beta2, double eps, double weight_decay, double step,
                              double grad_coef) {
  AdamW<F> a;
  a.beta1 = F(beta1);
  a.beta2 = F(beta2);
  a.rest1 = F(1 - beta1);
  a.rest2 = F(1 - beta2);
  a.eps = F(eps);
  a.decay = F(1 - lr * weight_decay);
  a.step_size = F(lr / (1 - pow(beta1, step)));
  a.inv_sqrt_bias2 = F(1 / sqrt(1 - pow(beta2, step)));
  a.grad_coef = F(grad_coef);
  return a;
}

SPRAND_HD float root(float x) { return sqrtf(x); }
SPRAND_HD double root(double x) { return sqrt(x); }

// Decoupled weight decay (arXiv 1711.05101), as torch.optim.AdamW: returns the new delta, updates the moments.
template <class F>
SPRAND_HD F adamw_entry(const AdamW<F>& a, F delta, F grad, F& exp_avg, F& exp_avg_sq) {
  F g = grad * a.grad_coef;
  F change = g - exp_avg;
  exp_avg = a.rest1 < F(0.5) ? exp_avg + a.rest1 * change : g - a.beta1 * change;  // as torch.lerp: exact at beta1 = 0
  exp_avg_sq = a.beta2 * exp_avg_sq + a.rest2 * (g * g);
  F denominator = root(exp_avg_sq) * a.inv_sqrt_bias2 + a.eps;
  return delta * a.decay - a.step_size * (exp_avg / denominator);
}

}  // namespace sprand
