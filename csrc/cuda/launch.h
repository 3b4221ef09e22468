// The launchers of the CUDA kernels: raw device pointers, sizes and a stream in, the launch error out.
//
// None of them synchronises, allocates or reads device memory on the host, so each can be captured in a CUDA graph. nnz = 0
// launches nothing. They run on the device that is current on the calling thread.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>

namespace sprand::cuda {

enum class DType { f32, f16, bf16 };
enum class IndexType { i32, i64 };

// The chosen entries of one weight: flat positions, ascending and unique.
struct Indices {
  const void* data;
  IndexType type;
  int64_t nnz;
};

// sddmm.cu. grad_output [tokens, out_features], input [tokens, in_features], both of `dtype`; out [nnz].
// `partial` holds [sddmm_splits(tokens, nnz), nnz] floats, and is not touched where that is one split.
// With `accumulate` the sums are added to what `out` holds. For any pattern without a plan; see sddmm_rows.h.
int64_t sddmm_splits(int64_t tokens, int64_t nnz);
cudaError_t sddmm(const void* grad_output, const void* input, DType dtype, Indices indices, float* out, float* partial,
                  bool accumulate, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream);

// sum_splits.cu. `partial` [splits, nnz].
cudaError_t sum_splits(const float* partial, float* out, int64_t nnz, int64_t splits, bool accumulate, cudaStream_t stream);

// embedding_grad.cu. A stable sort of the tokens: `sorted` [count] and, in their old order, where they were. `padding` is the
// token left out, -1 for none.
struct Tokens {
  const void* sorted;
  IndexType type;
  const int64_t* order;
  int64_t count;
  int64_t padding;
};
// grad_output [tokens, features] of `dtype`; out [nnz] holds zeros. `partial` holds embedding_grad_partial(...) floats.
int64_t embedding_grad_partial(int64_t tokens, int64_t features, int64_t nnz);
cudaError_t embedding_grad(const void* grad_output, DType dtype, Tokens tokens, Indices indices, float* out, float* partial,
                           int64_t features, cudaStream_t stream);

// gather.cu
cudaError_t gather(const void* weight, DType dtype, Indices indices, void* out, cudaStream_t stream);

// patch.cu. `base` [nnz] of `dtype`; without `delta` the base is put back.
cudaError_t patch(void* weight, DType dtype, Indices indices, const void* base, const float* delta, float scale,
                  cudaStream_t stream);

// scatter_add.cu
cudaError_t scatter_add(void* weight, DType dtype, Indices indices, const float* values, float scale, cudaStream_t stream);

// sparse_adamw.cu: one target of the step, and the options that all targets share. `step` is one float, counting this step
// already; lr_tensor, grad_coef and found_inf are one float each or null. All four live in device memory.
struct AdamWTarget {
  void* weight;
  DType dtype;
  Indices indices;
  const void* base;
  float* delta;
  const float* grad;
  float* exp_avg;
  float* exp_avg_sq;
  const float* step;
  float scale;
};
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  const float* lr_tensor;
  const float* grad_coef;
  const float* found_inf;
};
cudaError_t sparse_adamw(const AdamWTarget& target, const AdamWOptions& options, cudaStream_t stream);

// pattern.cu: fill `indices` (nnz of them) with a draw of positions; runs of run_rows x run_cols divide rows, cols and nnz.
cudaError_t stratified_indices(void* indices, IndexType type, int64_t nnz, int64_t rows, int64_t cols, uint64_t key,
                               int64_t run_rows, int64_t run_cols, cudaStream_t stream);
cudaError_t uniform_indices(void* indices, IndexType type, int64_t nnz, int64_t numel, uint64_t key, cudaStream_t stream);

}  // namespace sprand::cuda
