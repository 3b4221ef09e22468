// sddmm: out[p] = sum over t of grad_output[t, row p] * input[t, column p], for the chosen entries p of a weight.
//
// Contract: both inputs contiguous and token-major; indices ascending, any spacing; any tokens, features and nnz, where no tokens
// give zeros. Sums in float32: products are added in tiles of 32 tokens, tiles in order of tokens, splits in order of tokens, so
// the result is the same bits in every run and on every device. No atomics.
//
// Grid: x walks the entries, 1024 per block and 4 per thread; y walks the splits of the tokens, so that a pattern with few
// entries fills the device too. Blocks of one split follow each other and share its input rows in L2.
//
// Lanes lie over entries, not over tokens: with token-major inputs 32 tokens of one column are 32 lines apart, while the
// entries of a warp are neighbours in the pattern. They share one or two rows of the weight, so grad_output is one broadcast,
// and their ascending columns fall into one row of input, which the 1024 entries of the block then find in L1. Each thread has
// 4 independent sums and no barrier to wait at. Its bound is L2: every block reads its tokens' rows of input once more.
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kPerThread = 4;
constexpr int kPerBlock = kThreads * kPerThread;
constexpr int kTile = 32;

// Constants, not facts of the device: the order of the sum must not depend on where it runs.
constexpr int64_t kWantedBlocks = 1056;
constexpr int64_t kTokensPerSplit = 128;
constexpr int64_t kMostSplits = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T, class I>
__global__ void __launch_bounds__(kThreads)
    sddmm_kernel(const T* __restrict__ grad_output, const T* __restrict__ input, const I* __restrict__ indices,
                 float* __restrict__ out, int64_t tokens, int64_t out_features, int64_t in_features, int64_t nnz,
                 int64_t split_tokens, bool accumulate) {
  const int64_t first_entry = int64_t{blockIdx.x} * kPerBlock + threadIdx.x;
  const int64_t begin = blockIdx.y * split_tokens;
  const int64_t end = begin + split_tokens < tokens ? begin + split_tokens : tokens;

  int64_t row[kPerThread], column[kPerThread];
  float sum[kPerThread];
  bool inside_weight[kPerThread];  // an index outside of it gives zero
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t entry = first_entry + k * kThreads;
    I position = entry < nnz ? indices[entry] : I{0};  // spare threads sum entry 0 and store nothing
    inside_weight[k] = inside(position, out_features * in_features);
    if (!inside_weight[k]) position = 0;
    row[k] = position / static_cast<I>(in_features);
    column[k] = position % static_cast<I>(in_features);
    sum[k] = 0.f;
  }
  for (int64_t tile = begin; tile < end; tile += kTile) {
    const int count = end - tile < kTile ? static_cast<int>(end - tile) : kTile;
    const T* grad_row = grad_output + tile * out_features;
    const T* input_row = input + tile * in_features;
    float part[kPerThread] = {};
#pragma unroll 4
    for (int t = 0; t < count; ++t) {
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) part[k] = fmaf(to_float(grad_row[row[k]]), to_float(input_row[column[k]]), part[k]);
      grad_row += out_features;
      input_row += in_features;
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) sum[k] += part[k];
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t entry = first_entry + k * kThreads;
    if (entry >= nnz) continue;
    float& result = out[blockIdx.y * nnz + entry];
    const float value = inside_weight[k] ? sum[k] : 0.f;
    result = accumulate ? result + value : value;
  }
}

}  // namespace

int64_t sddmm_splits(int64_t tokens, int64_t nnz) {
  if (nnz == 0) return 1;
  int64_t splits = ceil_div(kWantedBlocks, ceil_div(nnz, kPerBlock));
  if (splits > kMostSplits) splits = kMostSplits;
  const int64_t useful = ceil_div(tokens, kTokensPerSplit);
  return splits < useful ? splits : useful > 1 ? useful : 1;
}

cudaError_t sddmm(const void* grad_output, const void* input, DType dtype, Indices indices, float* out, float* partial,
                  bool accumulate, int64_t tokens, int64_t out_features, int64_t in_features, cudaStream_t stream) {
  if (indices.nnz == 0) return cudaSuccess;
  const int64_t splits = sddmm_splits(tokens, indices.nnz);
  if (accumulate && splits > 1) return cudaErrorInvalidValue;
  const int64_t split_tokens = ceil_div(ceil_div(tokens, splits), kTile) * kTile;
  const dim3 grid(static_cast<unsigned>(ceil_div(indices.nnz, kPerBlock)), static_cast<unsigned>(splits));
  const cudaError_t error = with_types(dtype, indices.type, [&](auto element, auto index) {
    using T = decltype(element);
    using I = decltype(index);
    SPRAND_LAUNCH((sddmm_kernel<T, I>), grid, kThreads, 0, stream, static_cast<const T*>(grad_output),
                  static_cast<const T*>(input), static_cast<const I*>(indices.data), splits > 1 ? partial : out, tokens,
                  out_features, in_features, indices.nnz, split_tokens, accumulate);
    return cudaGetLastError();
  });
  return error != cudaSuccess || splits == 1 ? error : sum_splits(partial, out, indices.nnz, splits, stream);
}

}  // namespace sprand::cuda
