// Registers the CUDA kernels of the operators in sprand/kernels/ops.py, which owns their schemas; the last checks, O(1) each.
//
// Compiled with SPRAND_SIMT, together with the .cu files, by g++: the same kernels run on CPU tensors as torch.ops.sprand_simt.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../sorted_tokens.h"
#include "arguments.h"
#include "launch.h"
#include "sddmm_rows.h"
#include "stream.h"

namespace sprand::cuda {
namespace {

// The plan of sprand/kernels/schedule.py; without one the kernel for any pattern serves.
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
                      plan.ranks >= 0 && plan.ranks <= v.slots && plan.width > 0 && plan.width <= v.columns &&
                      plan.width <= input.size(1) && plan.blocks > 0,
                  op, ": expected a schedule of sprand.kernels.schedule.make_schedule, got numbers out of range");
  const int64_t covered = plan.tiles * v.threads * v.rows_per_lane;
  STD_TORCH_CHECK(v.ordered || covered >= grad_output.size(1), op, ": expected a schedule for ", grad_output.size(1),
                  " rows, got one for another weight");
  STD_TORCH_CHECK(table->scalar_type() == ScalarType::Int && table->is_contiguous() &&
                      table->numel() == rows_table_size(plan, grad_output.size(1)),
                  op, ": expected a schedule table of ", rows_table_size(plan, grad_output.size(1)),
                  " int32 for this weight, got one of ", table->numel());
  return plan;
}

Tensor sddmm_op(const Tensor& grad_output, const Tensor& input, const Tensor& indices, const std::optional<Tensor>& table,
                const std::vector<int64_t>& launch_numbers) {
  constexpr const char* op = "sddmm";
  check_product(op, grad_output, input);
  check_device(op, grad_output, input);
  const DType dtype = value_type(op, input);
  const Indices positions = positions_of(op, indices, input);
  std::optional<RowsPlan> plan = plan_of(op, table, launch_numbers, grad_output, input, indices);
  Launch launch(input);
  const Tensor left = torch::stable::contiguous(grad_output);
  const Tensor right = torch::stable::contiguous(input);
  const int64_t tokens = input.size(0), rows = grad_output.size(1), columns = input.size(1);
  if (plan && !rows_fit(plan->variant, left.const_data_ptr(), right.const_data_ptr(), rows, columns)) plan.reset();
  const int64_t splits = plan ? rows_splits(*plan, tokens) : sddmm_splits(tokens, positions.nnz);
  const Tensor out = torch::stable::new_empty(input, {positions.nnz}, ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(input, {splits > 1 ? splits * positions.nnz : 0}, ScalarType::Float);
  float* const sums = static_cast<float*>(out.mutable_data_ptr());
  float* const parts = static_cast<float*>(partial.mutable_data_ptr());
  const void *g = left.const_data_ptr(), *x = right.const_data_ptr();
  launch.check(plan ? sddmm_rows(g, x, dtype, positions, *plan, sums, parts, tokens, rows, columns, launch.stream())
                    : sddmm(g, x, dtype, positions, sums, parts, false, tokens, rows, columns, launch.stream()),
               op);
  return out;
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
  launch.check(gather(weight.const_data_ptr(), weight.numel(), dtype, positions, out.mutable_data_ptr(), launch.stream()), op);
  return out;
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
  m.impl("embedding_grad", TORCH_BOX(&embedding_grad_op));
  m.impl("gather", TORCH_BOX(&gather_op));
  m.impl("stratified_indices_", TORCH_BOX(&stratified_indices_op));
  m.impl("uniform_indices_", TORCH_BOX(&uniform_indices_op));
}

}  // namespace
}  // namespace sprand::cuda

#ifdef SPRAND_SIMT
#include "../emulator/simt_host.h"
extern "C" __attribute__((visibility("default"))) void sprand_simt_set_order(int order) { simt::order = order; }
extern "C" __attribute__((visibility("default"))) int64_t sprand_simt_launches() { return simt::launches; }
STABLE_TORCH_LIBRARY_IMPL(sprand_simt, CPU, m) { sprand::cuda::register_operators(m); }
#else
STABLE_TORCH_LIBRARY_IMPL(sprand, CUDA, m) { sprand::cuda::register_operators(m); }
#endif
