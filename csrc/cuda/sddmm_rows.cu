// The launch of the row kernels: the grid of a plan, the splits of its tokens, and the sum of their partial sums.
#include "sddmm_rows.cuh"

namespace sprand::cuda {
namespace {

cudaError_t launch(DType dtype, const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream) {
  switch (dtype) {
    case DType::f32:
      return launch_rows_f32(variant, args, grid, stream);
    case DType::f16:
      return launch_rows_f16(variant, args, grid, stream);
    case DType::bf16:
      return launch_rows_bf16(variant, args, grid, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

bool has_rows_variant(const RowsVariant& variant, DType dtype) {
  return launch(dtype, variant, nullptr, dim3(1), nullptr) == cudaSuccess;
}

bool rows_fit(const RowsVariant& v, const void* grad_output, const void* input, int64_t out_features, int64_t in_features) {
  const int64_t together = v.ordered ? 1 : v.unit > 2 ? v.unit : 2;
  constexpr int64_t kWidest = int64_t{1} << 26;  // the bytes of a tile's tokens are counted in 32 bits
  return out_features % together == 0 && in_features % 2 == 0 && out_features < kWidest && in_features < kWidest &&
         reinterpret_cast<uintptr_t>(grad_output) % 8 == 0 && reinterpret_cast<uintptr_t>(input) % 8 == 0;
}

cudaError_t sddmm_rows(const void* grad_output, const void* input, DType dtype, Indices indices, const RowsPlan& plan, float* out,
                       float* partial, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (indices.nnz == 0) return cudaSuccess;
  const int64_t whole = tokens / kRowsGranule * kRowsGranule, splits = rows_splits(plan, whole);
  RowsArgs args;
  args.grad_output = grad_output;
  args.input = input;
  args.indices = indices.data;
  args.table = plan.table;
  args.sums = splits > 1 ? partial : out;
  args.tokens = whole;
  args.out_features = out_features;
  args.in_features = in_features;
  args.nnz = indices.nnz;
  args.split_tokens = rows_split_tokens(whole, splits);
  args.tiles = static_cast<int>(plan.tiles);
  args.ranks = static_cast<int>(plan.ranks);
  args.width = static_cast<int>(plan.width);
  args.long_indices = indices.type == IndexType::i64;
  const dim3 grid(static_cast<unsigned>(plan.tiles), static_cast<unsigned>(plan.windows), static_cast<unsigned>(splits));
  cudaError_t error = launch(dtype, plan.variant, &args, grid, stream);
  if (error == cudaSuccess && splits > 1) error = sum_splits(partial, out, indices.nnz, splits, stream);
  if (error != cudaSuccess || whole == tokens) return error;
  const int64_t size = dtype == DType::f32 ? 4 : 2;  // the last few tokens, added by the kernel for any shape
  return sddmm(static_cast<const char*>(grad_output) + whole * out_features * size,
               static_cast<const char*>(input) + whole * in_features * size, dtype, indices, out, nullptr, true, tokens - whole,
               out_features, in_features, stream);
}

}  // namespace sprand::cuda
