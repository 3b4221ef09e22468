// The launchers of the CUDA kernels: raw device pointers, sizes and a stream in, the launch error out.
//
// None of them synchronises, allocates or reads device memory on the host, so each can be captured in a CUDA graph. nnz = 0
// launches nothing. They run on the device that is current on the calling thread.
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "segments.h"
#include "types.h"

namespace sprand::cuda {

// sddmm.cu. grad_output [tokens, out_features], input [tokens, in_features], both of `dtype`; out [nnz].
// `partial` holds [sddmm_splits(tokens, nnz), nnz] floats, and is not touched where that is one split.
// For any pattern without a plan; see sddmm_rows.h. With `accumulate` the sums of few tokens, one split, are added to what `out`
// holds: so the row kernel serves its last tokens.
int64_t sddmm_splits(int64_t tokens, int64_t nnz);
cudaError_t sddmm(const void* grad_output, const void* input, DType dtype, Indices indices, float* out, float* partial,
                  bool accumulate, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream);

// sum_splits.cu. `partial` [splits, nnz].
cudaError_t sum_splits(const float* partial, float* out, int64_t nnz, int64_t splits, cudaStream_t stream);

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
cudaError_t gather(const void* weight, int64_t numel, DType dtype, Indices indices, void* out, cudaStream_t stream);

// patch.cu, scatter_add.cu, sparse_adamw.cu: all targets in one launch for each pair of dtypes among them, or in as many as their
// tables need (segments.h). No two targets share a weight.
cudaError_t patch(std::span<const Target<PatchSegment>> targets, cudaStream_t stream);
cudaError_t scatter_add(std::span<const Target<ScatterAddSegment>> targets, cudaStream_t stream);

// What all targets of a step share: lr_tensor, grad_coef and found_inf are one float each, in device memory, or null.
struct AdamWOptions {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
  const float* lr_tensor;
  const float* grad_coef;
  const float* found_inf;
};
cudaError_t sparse_adamw(std::span<const Target<AdamWSegment>> targets, const AdamWOptions& options, cudaStream_t stream);

// pattern.cu: fill `indices` (nnz of them) with a draw of positions; runs of run_rows x run_cols divide rows, cols and nnz.
cudaError_t stratified_indices(void* indices, IndexType type, int64_t nnz, int64_t rows, int64_t cols, uint64_t key,
                               int64_t run_rows, int64_t run_cols, cudaStream_t stream);
cudaError_t uniform_indices(void* indices, IndexType type, int64_t nnz, int64_t numel, uint64_t key, cudaStream_t stream);

}  // namespace sprand::cuda
