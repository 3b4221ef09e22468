// Registers the CUDA kernels of the operators of sprand/ops.py, which owns their schemas; here are the last checks, O(1) each.
//
// Compiled with SPRAND_SIMT, together with the .cu files, by g++: the same kernels run on CPU tensors as torch.ops.sprand_simt.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../checks.h"
#include "../sorted_tokens.h"
#include "launch.h"
#include "sddmm_rows.h"
#include "stream.h"

namespace sprand::cuda {
namespace {

DType value_type(const char* op, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Half:
      return DType::f16;
    case ScalarType::BFloat16:
      return DType::bf16;
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, bfloat16 or float16 on CUDA, got ",
                      torch::headeronly::toString(t.scalar_type()));
  }
}

void check_device(const char* op, const Tensor& t, const Tensor& other) {
  STD_TORCH_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(), op,
                  ": expected all tensors on one device");
}

IndexType index_type(const char* op, const Tensor& indices) {
  return long_indices(op, indices) ? IndexType::i64 : IndexType::i32;
}

Indices positions_of(const char* op, const Tensor& indices, const Tensor& other) {
  check_device(op, indices, other);
  return {indices.const_data_ptr(), index_type(op, indices), indices.numel()};
}

Indices positions_in(const char* op, const Tensor& weight, const Tensor& indices) {
  check_weight(op, weight, indices);
  return positions_of(op, indices, weight);
}

const void* entries_of(const char* op, const char* name, const Tensor& t, const Tensor& indices, ScalarType type) {
  check_entries(op, name, t, indices, type);
  check_device(op, t, indices);
  return t.const_data_ptr();
}

const float* floats_of(const char* op, const char* name, const Tensor& t, const Tensor& indices) {
  return static_cast<const float*>(entries_of(op, name, t, indices, ScalarType::Float));
}

float* written_floats_of(const char* op, const char* name, const Tensor& t, const Tensor& indices) {
  entries_of(op, name, t, indices, ScalarType::Float);
  return static_cast<float*>(t.mutable_data_ptr());
}

const float* number_of(const char* op, const char* name, const Tensor& t, const Tensor& indices) {
  STD_TORCH_CHECK(t.numel() == 1 && t.scalar_type() == ScalarType::Float, op, ": expected ", name, " as one float32");
  check_device(op, t, indices);
  return static_cast<const float*>(t.const_data_ptr());
}

const float* number_of(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& indices) {
  return t ? number_of(op, name, *t, indices) : nullptr;
}

// The plan of sprand/schedule.py; without one the kernel for any pattern serves.
std::optional<RowsPlan> plan_of(const char* op, const std::optional<Tensor>& table, const std::vector<int64_t>& launch,
                                const Tensor& grad_output, const Tensor& input, const Tensor& indices) {
  if (!table) return std::nullopt;
  constexpr size_t kNumbers = 11;
  STD_TORCH_CHECK(launch.size() == kNumbers, op, ": expected a schedule of ", kNumbers, " numbers, got ", launch.size());
  check_device(op, *table, indices);
  RowsPlan plan{{static_cast<int>(launch[0]), static_cast<int>(launch[1]), static_cast<int>(launch[2]),
                 static_cast<int>(launch[3]), static_cast<int>(launch[4]), launch[5] != 0},
                static_cast<const int32_t*>(table->const_data_ptr()),
                launch[6],
                launch[7],
                launch[8],
                launch[9],
                launch[10]};
  const RowsVariant& v = plan.variant;
  STD_TORCH_CHECK(has_rows_variant(v, value_type(op, input)), op,
                  ": no kernel for this schedule in the dtype of input; make it anew");
  STD_TORCH_CHECK(plan.tiles > 0 && plan.tiles < int64_t{1} << 31 && plan.windows > 0 && plan.windows < 65536 &&
                      plan.ranks >= 0 && plan.ranks <= v.slots && plan.width > 0 && plan.width <= v.columns && plan.blocks > 0,
                  op, ": expected a schedule of sprand.ops.make_schedule, got numbers out of range");
  const int64_t covered = plan.tiles * v.threads * v.rows_per_lane;
  STD_TORCH_CHECK(v.ordered || covered >= grad_output.size(1), op, ": expected a schedule for ", grad_output.size(1),
                  " rows, got one for another weight");
  STD_TORCH_CHECK(table->scalar_type() == ScalarType::Int && table->is_contiguous() &&
                      table->numel() == rows_table_size(plan, grad_output.size(1)),
                  op, ": expected a schedule table of ", rows_table_size(plan, grad_output.size(1)),
                  " int32 for this weight, got one of ", table->numel());
  return plan;
}

void run_sddmm(const char* op, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
               const std::optional<Tensor>& table, const std::vector<int64_t>& launch_numbers, const Tensor& out,
               bool accumulate) {
  const DType dtype = value_type(op, input);
  const Indices positions = positions_of(op, indices, input);
  std::optional<RowsPlan> plan = plan_of(op, table, launch_numbers, grad_output, input, indices);
  Launch launch(input);
  const Tensor left = torch::stable::contiguous(grad_output);
  const Tensor right = torch::stable::contiguous(input);
  const int64_t tokens = input.size(0), rows = grad_output.size(1), columns = input.size(1);
  if (plan && !rows_fit(plan->variant, left.const_data_ptr(), right.const_data_ptr(), rows, columns)) plan.reset();
  const int64_t splits = plan ? rows_splits(*plan, tokens) : sddmm_splits(tokens, positions.nnz);
  const Tensor partial = torch::stable::new_empty(input, {splits > 1 ? splits * positions.nnz : 0}, ScalarType::Float);
  float* const sums = static_cast<float*>(out.mutable_data_ptr());
  float* const parts = static_cast<float*>(partial.mutable_data_ptr());
  const void *g = left.const_data_ptr(), *x = right.const_data_ptr();
  launch.check(plan ? sddmm_rows(g, x, dtype, positions, *plan, sums, parts, accumulate, tokens, rows, columns, launch.stream())
                    : sddmm(g, x, dtype, positions, sums, parts, accumulate, tokens, rows, columns, launch.stream()),
               op);
}

Tensor sddmm_op(const Tensor& grad_output, const Tensor& input, const Tensor& indices, const std::optional<Tensor>& table,
                const std::vector<int64_t>& launch) {
  check_sddmm(grad_output, input);
  check_device("sddmm", grad_output, input);
  const Tensor out = torch::stable::new_empty(input, {indices.numel()}, ScalarType::Float);
  run_sddmm("sddmm", grad_output, input, indices, table, launch, out, false);
  return out;
}

void sddmm_add_op(const Tensor& sums, const Tensor& grad_output, const Tensor& input, const Tensor& indices,
                  const std::optional<Tensor>& table, const std::vector<int64_t>& launch) {
  check_sddmm(grad_output, input);
  check_device("sddmm_add_", grad_output, input);
  floats_of("sddmm_add_", "sums", sums, indices);
  run_sddmm("sddmm_add_", grad_output, input, indices, table, launch, sums, true);
}

Tensor embedding_grad_op(const Tensor& grad_output, const Tensor& tokens, const Tensor& indices,
                         std::optional<int64_t> padding_idx) {
  constexpr const char* op = "embedding_grad";
  check_embedding_grad(grad_output, tokens, indices);
  check_device(op, grad_output, tokens);
  const DType dtype = value_type(op, grad_output);
  const Indices positions = positions_of(op, indices, grad_output);
  const int64_t count = tokens.size(0), features = grad_output.size(1);
  Launch launch(grad_output);
  const Tensor rows = torch::stable::contiguous(grad_output);
  const SortedTokens sorted = sort_tokens(tokens);
  const Tensor out = torch::stable::new_zeros(grad_output, {positions.nnz}, ScalarType::Float);
  const Tensor partial =
      torch::stable::new_empty(grad_output, {embedding_grad_partial(count, features, positions.nnz)}, ScalarType::Float);
  launch.check(embedding_grad(rows.const_data_ptr(), dtype,
                              {sorted.values.const_data_ptr(), index_type(op, sorted.values),
                               sorted.order.const_data_ptr<int64_t>(), count, padding_idx.value_or(-1)},
                              positions, static_cast<float*>(out.mutable_data_ptr()),
                              static_cast<float*>(partial.mutable_data_ptr()), features, launch.stream()),
               op);
  return out;
}

Tensor gather_op(const Tensor& weight, const Tensor& indices) {
  constexpr const char* op = "gather";
  const DType dtype = value_type(op, weight);
  const Indices positions = positions_in(op, weight, indices);
  Launch launch(weight);
  const Tensor out = torch::stable::new_empty(weight, {positions.nnz});
  launch.check(gather(weight.const_data_ptr(), dtype, positions, out.mutable_data_ptr(), launch.stream()), op);
  return out;
}

void patch_op(const Tensor& weight, const Tensor& indices, const Tensor& base, const std::optional<Tensor>& delta, double scale) {
  constexpr const char* op = "patch_";
  const DType dtype = value_type(op, weight);
  const Indices positions = positions_in(op, weight, indices);
  const void* entries = entries_of(op, "base", base, indices, weight.scalar_type());
  const float* change = delta ? floats_of(op, "delta", *delta, indices) : nullptr;
  Launch launch(weight);
  launch.check(patch(weight.mutable_data_ptr(), dtype, positions, entries, change, static_cast<float>(scale), launch.stream()),
               op);
}

void scatter_add_op(const Tensor& weight, const Tensor& indices, const Tensor& values, double scale) {
  constexpr const char* op = "scatter_add_";
  const DType dtype = value_type(op, weight);
  const Indices positions = positions_in(op, weight, indices);
  const float* entries = floats_of(op, "values", values, indices);
  Launch launch(weight);
  launch.check(scatter_add(weight.mutable_data_ptr(), dtype, positions, entries, static_cast<float>(scale), launch.stream()), op);
}

using Tensors = std::vector<Tensor>;

void sparse_adamw_op(const Tensors& weights, const Tensors& indices, const Tensors& bases, const Tensors& deltas,
                     const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs, const Tensors& steps,
                     const std::vector<double>& scales, double lr, double beta1, double beta2, double eps, double weight_decay,
                     bool maximize, const std::optional<Tensor>& lr_tensor, const std::optional<Tensor>& grad_coef,
                     const std::optional<Tensor>& found_inf) {
  constexpr const char* op = "sparse_adamw_";
  const size_t count = weights.size();
  STD_TORCH_CHECK(indices.size() == count && bases.size() == count && deltas.size() == count && grads.size() == count &&
                      exp_avgs.size() == count && exp_avg_sqs.size() == count && steps.size() == count && scales.size() == count,
                  op, ": expected lists of one length, one element per target");
  AdamWOptions options = {lr, beta1, beta2, eps, weight_decay, maximize, nullptr, nullptr, nullptr};
  std::vector<AdamWTarget> targets;  // all are checked before the first is changed
  targets.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const Tensor& index = indices[i];
    targets.push_back({
        .weight = weights[i].mutable_data_ptr(),
        .dtype = value_type(op, weights[i]),
        .indices = positions_in(op, weights[i], index),
        .base = entries_of(op, "base", bases[i], index, weights[i].scalar_type()),
        .delta = written_floats_of(op, "delta", deltas[i], index),
        .grad = floats_of(op, "grad", grads[i], index),
        .exp_avg = written_floats_of(op, "exp_avg", exp_avgs[i], index),
        .exp_avg_sq = written_floats_of(op, "exp_avg_sq", exp_avg_sqs[i], index),
        .step = number_of(op, "step", steps[i], index),
        .scale = static_cast<float>(scales[i]),
    });
    options.lr_tensor = number_of(op, "lr", lr_tensor, index);
    options.grad_coef = number_of(op, "grad_coef", grad_coef, index);
    options.found_inf = number_of(op, "found_inf", found_inf, index);
  }
  for (size_t i = 0; i < count; ++i) {
    Launch launch(weights[i]);
    launch.check(sparse_adamw(targets[i], options, launch.stream()), op);
  }
}

void stratified_indices_op(const Tensor& indices, int64_t rows, int64_t cols, int64_t key, int64_t run_rows, int64_t run_cols) {
  constexpr const char* op = "stratified_indices_";
  const IndexType type = index_type(op, indices);
  constexpr int64_t limit = int64_t{1} << 32;
  STD_TORCH_CHECK(rows >= 0 && rows < limit && cols >= 0 && cols < limit, op, ": expected rows and cols below 2**32, got ", rows,
                  " and ", cols);
  const auto positions = static_cast<unsigned __int128>(rows) * static_cast<unsigned __int128>(cols);
  STD_TORCH_CHECK(positions >= static_cast<uint64_t>(indices.numel()), op, ": more entries than positions");
  check_runs(op, indices, rows, cols, run_rows, run_cols);
  Launch launch(indices);
  launch.check(stratified_indices(indices.mutable_data_ptr(), type, indices.numel(), rows, cols, static_cast<uint64_t>(key),
                                  run_rows, run_cols, launch.stream()),
               op);
}

void uniform_indices_op(const Tensor& indices, int64_t numel, int64_t key) {
  constexpr const char* op = "uniform_indices_";
  const IndexType type = index_type(op, indices);
  STD_TORCH_CHECK(numel >= indices.numel() && numel < int64_t{1} << 62, op, ": expected ", indices.numel(),
                  " to 2**62 positions, got ", numel);
  Launch launch(indices);
  launch.check(
      uniform_indices(indices.mutable_data_ptr(), type, indices.numel(), numel, static_cast<uint64_t>(key), launch.stream()), op);
}

void register_operators(torch::stable::detail::StableLibrary& m) {
  m.impl("sddmm", TORCH_BOX(&sddmm_op));
  m.impl("sddmm_add_", TORCH_BOX(&sddmm_add_op));
  m.impl("embedding_grad", TORCH_BOX(&embedding_grad_op));
  m.impl("gather", TORCH_BOX(&gather_op));
  m.impl("patch_", TORCH_BOX(&patch_op));
  m.impl("scatter_add_", TORCH_BOX(&scatter_add_op));
  m.impl("sparse_adamw_", TORCH_BOX(&sparse_adamw_op));
  m.impl("stratified_indices_", TORCH_BOX(&stratified_indices_op));
  m.impl("uniform_indices_", TORCH_BOX(&uniform_indices_op));
}

}  // namespace
}  // namespace sprand::cuda

#ifdef SPRAND_SIMT
#include "../common/simt_host.h"
extern "C" __attribute__((visibility("default"))) void sprand_simt_set_order(int order) { simt::order = order; }
STABLE_TORCH_LIBRARY_IMPL(sprand_simt, CPU, m) { sprand::cuda::register_operators(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(sprand, CUDA, m) { sprand::cuda::register_operators(m); }
#endif
