// The last line of argument checks, shared by the CPU and CUDA operators; users meet the ones in sprand/kernels/ops.py first.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "places.h"

namespace sprand {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline bool long_indices(const char* op, const Tensor& indices) {
  const ScalarType type = indices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, op, ": expected indices of int32 or int64");
  STD_TORCH_CHECK(indices.dim() == 1 && indices.is_contiguous(), op, ": expected contiguous indices [nnz]");
  return type == ScalarType::Long;
}

inline ScalarType sum_type(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_entries(const char* op, const char* name, const Tensor& value, int64_t nnz, ScalarType type) {
  STD_TORCH_CHECK(value.scalar_type() == type && value.numel() == nnz && value.is_contiguous(), op, ": expected contiguous ",
                  name, " [nnz] of the accumulation or weight dtype");
}

inline void check_weight(const char* op, const Tensor& weight, const Tensor& indices) {
  STD_TORCH_CHECK(weight.is_contiguous(), op, ": expected a contiguous weight");
  STD_TORCH_CHECK(indices.numel() <= weight.numel(), op, ": more indices than the weight has entries");
}

// Where the nnz entries of a weight are: at flat indices, one for each; or, where there are fewer indices, in the columns
// (dimension 1) that these number, all of each.
inline Places places_in(const char* op, const Tensor& weight, const Tensor& indices, int64_t nnz) {
  check_weight(op, weight, indices);
  const int64_t numel = weight.numel();
  if (nnz == indices.numel()) return {nnz, nnz, numel, 1};
  STD_TORCH_CHECK(weight.dim() >= 2 && nnz * weight.size(1) == numel * indices.numel(), op,
                  ": expected an index for each entry, or the numbers of columns that the entries are all of");
  const int64_t rows = weight.size(0), run = numel / rows / weight.size(1);
  return {nnz, indices.numel() * run, numel / rows, run};
}

inline void check_runs(const char* op, const Tensor& indices, int64_t rows, int64_t cols, int64_t run_rows, int64_t run_cols) {
  STD_TORCH_CHECK(run_rows > 0 && run_cols > 0 && rows % run_rows == 0 && cols % run_cols == 0 &&
                      indices.numel() % run_rows == 0 && indices.numel() / run_rows % run_cols == 0,
                  op, ": expected runs of ", run_rows, " x ", run_cols, " that divide rows, cols and the entries");
}

inline void check_product(const char* op, const Tensor& grad_output, const Tensor& input) {
  STD_TORCH_CHECK(grad_output.dim() == 2 && input.dim() == 2 && grad_output.size(0) == input.size(0), op,
                  ": expected grad_output [T, out] and input [T, in]");
  STD_TORCH_CHECK(grad_output.scalar_type() == input.scalar_type(), op, ": expected one dtype");
}

}  // namespace sprand
