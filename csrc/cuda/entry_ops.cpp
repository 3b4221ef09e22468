// Registers the CUDA operators that write chosen entries: patch_, patch_all_, scatter_add_all_ and sparse_adamw_.
//
// All targets of a call are checked before the first is changed, and lie on one device. Compiled with SPRAND_SIMT as ops.cpp is.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "arguments.h"
#include "launch.h"
#include "stream.h"

namespace sprand::cuda {
namespace {

using Tensors = std::vector<Tensor>;

Target<PatchSegment> patch_target(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& base,
                                  const Tensor* delta, double scale) {
  const auto [positions, columns] = chosen_in(op, weight, indices, base);
  return {{.weight = weight.mutable_data_ptr(),
           .indices = positions.data,
           .base = entries_of(op, "base", base, positions, weight, weight.scalar_type()),
           .delta = delta != nullptr ? floats_of(op, "delta", *delta, positions, weight) : nullptr,
           .columns = columns,
           .nnz = positions.nnz,
           .numel = weight.numel(),
           .scale = static_cast<float>(scale),
           .first_block = 0},
          value_type(op, weight),
          positions.type};
}

Target<ScatterAddSegment> scatter_add_target(const char* op, const Tensor& weight, const Tensor& indices, const Tensor& values,
                                             double scale) {
  const Indices positions = positions_in(op, weight, indices);
  return {{.weight = weight.mutable_data_ptr(),
           .indices = positions.data,
           .values = floats_of(op, "values", values, positions, weight),
           .nnz = positions.nnz,
           .numel = weight.numel(),
           .scale = static_cast<float>(scale),
           .first_block = 0},
          value_type(op, weight),
          positions.type};
}

template <class... Lists>
void check_lists(const char* op, const Tensors& weights, const Lists&... lists) {
  STD_TORCH_CHECK(((lists.size() == weights.size()) && ...), op, ": expected lists of one length, one element per target");
  for (const Tensor& weight : weights) check_device(op, weight, weights[0]);
}

void patch_op(const Tensor& weight, const Tensor& indices, const Tensor& base, const std::optional<Tensor>& delta, double scale) {
  constexpr const char* op = "patch_";
  const Target<PatchSegment> target = patch_target(op, weight, indices, base, delta ? &*delta : nullptr, scale);
  Launch launch(weight);
  launch.check(patch({&target, 1}, launch.stream()), op);
}

void patch_all_op(const Tensors& weights, const Tensors& indices, const Tensors& bases, const std::optional<Tensors>& deltas,
                  const std::vector<double>& scales) {
  constexpr const char* op = "patch_all_";
  check_lists(op, weights, indices, bases, deltas ? *deltas : bases, scales);
  if (weights.empty()) return;
  std::vector<Target<PatchSegment>> targets;
  targets.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    targets.push_back(patch_target(op, weights[i], indices[i], bases[i], deltas ? &(*deltas)[i] : nullptr, scales[i]));
  Launch launch(weights[0]);
  launch.check(patch(targets, launch.stream()), op);
}

void scatter_add_all_op(const Tensors& weights, const Tensors& indices, const Tensors& values,
                        const std::vector<double>& scales) {
  constexpr const char* op = "scatter_add_all_";
  check_lists(op, weights, indices, values, scales);
  if (weights.empty()) return;
  std::vector<Target<ScatterAddSegment>> targets;
  targets.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i)
    targets.push_back(scatter_add_target(op, weights[i], indices[i], values[i], scales[i]));
  Launch launch(weights[0]);
  launch.check(scatter_add(targets, launch.stream()), op);
}

void sparse_adamw_op(const Tensors& weights, const Tensors& indices, const Tensors& bases, const Tensors& deltas,
                     const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps,
                     const std::vector<double>& scales, double lr, double beta1, double beta2, double eps, double weight_decay,
                     bool maximize, const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_coef,
                     const std::optional<Tensor>& found_inf) {
  constexpr const char* op = "sparse_adamw_";
  check_lists(op, weights, indices, bases, deltas, grads, exp_avgs, exp_avg_sqs, steps, scales);
  if (weights.empty()) return;
  const AdamWOptions options = {.lr = lr,
                                .beta1 = beta1,
                                .beta2 = beta2,
                                .eps = eps,
                                .weight_decay = weight_decay,
                                .maximize = maximize,
                                .lr_tensor = number_of(op, "lr", lr_tensor, weights[0]),
                                .grad_coef = number_of(op, "grad_coef", grad_coef, weights[0]),
                                .found_inf = number_of(op, "found_inf", found_inf, weights[0])};
  std::vector<Target<AdamWSegment>> targets;
  targets.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const Tensor& weight = weights[i];
    const auto [positions, columns] = chosen_in(op, weight, indices[i], bases[i]);
    targets.push_back({{.weight = weight.mutable_data_ptr(),
                        .indices = positions.data,
                        .base = entries_of(op, "base", bases[i], positions, weight, weight.scalar_type()),
                        .delta = written_floats_of(op, "delta", deltas[i], positions, weight),
                        .grad = floats_of(op, "grad", grads[i], positions, weight),
                        .exp_avg = written_floats_of(op, "exp_avg", exp_avgs[i], positions, weight),
                        .exp_avg_sq = written_floats_of(op, "exp_avg_sq", exp_avg_sqs[i], positions, weight),
                        .step = number_of(op, "step", steps[i], weight),
                        .columns = columns,
                        .nnz = positions.nnz,
                        .numel = weight.numel(),
                        .scale = static_cast<float>(scales[i]),
                        .first_block = 0},
                       value_type(op, weight),
                       positions.type});
  }
  Launch launch(weights[0]);
  launch.check(sparse_adamw(targets, options, launch.stream()), op);
}

void register_entry_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("patch_", TORCH_BOX(&patch_op));
  m.impl("patch_all_", TORCH_BOX(&patch_all_op));
  m.impl("scatter_add_all_", TORCH_BOX(&scatter_add_all_op));
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_op));
}

}  // namespace
}  // namespace sprand::cuda

#ifdef SPRAND_SIMT
STABLE_TORCH_LIBRARY_IMPL(sprand_simt, CPU, m) { sprand::cuda::register_entry_operators(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(sprand, CUDA, m) { sprand::cuda::register_entry_operators(m); }
#endif
