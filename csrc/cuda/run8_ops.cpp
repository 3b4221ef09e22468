// Registers the CUDA kernel of sddmm_run8, as ops.cpp does those of the other operators, with all checks, O(1) each.
#include <torch/csrc/stable/library.h>

#include <vector>

#include "../checks.h"
#include "sddmm_run8.h"
#include "stream.h"

namespace sprand::cuda {
namespace {

constexpr const char* kOp = "sddmm_run8";

Tensor sddmm_run8_op(const Tensor& grad_output, const Tensor& input, const Tensor& table, const std::vector<int64_t>& launch,
                     int64_t nnz) {
  check_product(kOp, grad_output, input);
  const ScalarType type = input.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, kOp, ": expected bfloat16 or float16 on CUDA, got ",
                  torch::headeronly::toString(type));
  for (const Tensor* other : {&input, &table}) {
    STD_TORCH_CHECK(grad_output.is_cuda() == other->is_cuda() && grad_output.get_device_index() == other->get_device_index(), kOp,
                    ": expected all tensors on one device");
  }
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && table.dim() == 1 && table.is_contiguous(), kOp,
                  ": expected a contiguous table of int32");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(table.const_data_ptr()) % 16 == 0, kOp,
                  ": expected a table aligned to 16 bytes, got a part of another tensor; give run8_schedule's own, or its clone");
  STD_TORCH_CHECK(launch.size() == 5, kOp, ": expected the 5 numbers that come with the table, got ", launch.size());
  STD_TORCH_CHECK(nnz >= 0 && nnz % 8 == 0 && input.size(1) % 8 == 0, kOp,
                  ": expected nnz and input features in multiples of 8, got ", nnz, " and ", input.size(1));
  Launch on(input);
  const Tensor left = torch::stable::contiguous(grad_output);
  Tensor right = torch::stable::contiguous(input);
  if (reinterpret_cast<uintptr_t>(right.const_data_ptr()) % 16) right = torch::stable::clone(right);
  const Run8Schedule schedule = {
      static_cast<const int32_t*>(table.const_data_ptr()), table.numel(), launch[0], launch[1], launch[2], launch[3], launch[4]};
  const int64_t splits = sddmm_run8_splits(input.size(0), schedule, nnz);
  const Tensor out = torch::stable::new_empty(input, {nnz}, ScalarType::Float);
  const Tensor partial = torch::stable::new_empty(input, {splits > 1 ? splits * nnz : 0}, ScalarType::Float);
  on.check(sddmm_run8(left.const_data_ptr(), right.const_data_ptr(), type == ScalarType::Half ? DType::f16 : DType::bf16,
                      schedule, static_cast<float*>(out.mutable_data_ptr()), static_cast<float*>(partial.mutable_data_ptr()),
                      input.size(0), grad_output.size(1), input.size(1), nnz, on.stream()),
           kOp);
  return out;
}

}  // namespace
}  // namespace sprand::cuda

#ifdef SPRAND_SIMT
STABLE_TORCH_LIBRARY_IMPL(sprand_simt, CPU, m) { m.impl("sddmm_run8", TORCH_BOX(&sprand::cuda::sddmm_run8_op)); }
#else
STABLE_TORCH_LIBRARY_IMPL(sprand, CUDA, m) { m.impl("sddmm_run8", TORCH_BOX(&sprand::cuda::sddmm_run8_op)); }
#endif
