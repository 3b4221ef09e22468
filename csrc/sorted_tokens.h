// The checks of embedding_grad and torch's own stable sort of its tokens, shared by the CPU and CUDA operators.
#pragma once
#include <array>

#include "checks.h"

namespace sprand {

inline void check_embedding_grad(const Tensor& grad_output, const Tensor& tokens, const Tensor& indices) {
  STD_TORCH_CHECK(grad_output.dim() == 2 && tokens.dim() == 1 && grad_output.size(0) == tokens.size(0),
                  "embedding_grad: expected grad_output [T, features] and tokens [T]");
  const ScalarType type = tokens.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "embedding_grad: expected tokens of int32 or int64");
  STD_TORCH_CHECK(grad_output.size(1) > 0 || indices.numel() == 0, "embedding_grad: more indices than the weight has entries");
}

// `values` ascending, equal ones in their order; `order[i]` (int64) is where values[i] was. No wait for the device.
struct SortedTokens {
  Tensor values, order;
};

inline SortedTokens sort_tokens(const Tensor& tokens) {
  using torch::stable::detail::from, torch::stable::detail::to;
  std::array<StableIValue, 4> stack{from(torch::stable::contiguous(tokens)), from(std::optional<bool>(true)), from(int64_t{0}),
                                    from(false)};  // stable, dim, descending
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  Tensor values = to<Tensor>(stack[0]);
  return {values, to<Tensor>(stack[1])};
}

}  // namespace sprand
