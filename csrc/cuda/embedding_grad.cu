// embedding_grad: out[p] = sum over the tokens t at row p of grad_output[t, column p], for the chosen entries p of an embedding.
//
// Contract: `sorted` ascending and `order` a stable sort of the tokens; indices ascending, any spacing; `out` zeros. A token that
// is no row with chosen entries, be it outside the vocabulary, is left out. Sums in float32, grouped as embedding_math.h
// says: the same bits in every run and as on the CPU. No atomics, nothing of the vocabulary's size beside `out`.
//
// Grid of both kernels: one block per tile of 32 sorted tokens. The sorted tokens of one row are a run, its groups of 32 begin at
// the run's start, and a group belongs to the tile in which it begins. A frequent token is so spread over as many blocks as
// it has groups, and a block has at most 32 groups or tokens to walk, whatever the tokens. Its threads take the pairs (group,
// entry) one after the other: neighbours share a token's row of grad_output and read it in ascending order.
//
// The first group of a run writes `out`, the others `partial`. A group that is not the first begins 32 after another of its
// run, so a tile has one such group at most, and one row of `partial` is enough for it: group k of a run that starts in tile i
// is row i + k. The second kernel adds them to `out` in order; in most tiles no run of more than 32 starts, and it ends there.
#include "../embedding_math.h"
#include "kernel.cuh"

namespace sprand::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = kTokenGroup;
constexpr int kWarp = 32;

int64_t tiles_of(int64_t tokens) { return (tokens + kTile - 1) / kTile; }
int64_t partial_width(int64_t features, int64_t nnz) { return nnz < features ? nnz : features; }

// Within 0 and `width` also where the positions do not ascend or repeat.
__device__ __forceinline__ int64_t entries_of_row(int64_t begin, int64_t end, int64_t width) {
  const int64_t entries = end > begin ? end - begin : 0;
  return entries < width ? entries : width;
}

template <class T, class I, class Token>
__global__ void __launch_bounds__(kThreads)
    sum_groups_kernel(const T* __restrict__ grad_output, const Token* __restrict__ sorted, const int64_t* __restrict__ order,
                      const I* __restrict__ indices, float* __restrict__ out, float* __restrict__ partial, int64_t tokens,
                      int64_t features, int64_t nnz, int64_t width, int64_t padding) {
  // Per sorted token of the tile, as if a group began there:
  __shared__ int64_t row_start[kTile], entry_begin[kTile], entry_end[kTile], rank[kTile];
  __shared__ int length[kTile];
  __shared__ int64_t pairs_before[kTile + 1];
  __shared__ int64_t source[2 * kTile];  // the rows of grad_output that the groups reach

  const int64_t tile = int64_t{blockIdx.x} * kTile;
  const int lane = threadIdx.x % kWarp;
  const int64_t position = tile + lane;
  const int64_t token = position < tokens ? int64_t{sorted[position]} : -1;
  const bool trained = is_trained_row(token, indices[nnz - 1], features, padding);
  switch (threadIdx.x / kWarp) {  // one search per warp, so that none waits for another
    case 0:
      row_start[lane] = trained ? token * features : 0;
      entry_begin[lane] = trained ? first_not_below(indices, 0, nnz, token * features) : 0;
      break;
    case 1:
      entry_end[lane] = trained ? first_not_below(indices, 0, nnz, (token + 1) * features) : 0;
      break;
    case 2:
      rank[lane] = trained ? position - first_not_below(sorted, 0, position, token) : 0;
      break;
    case 3: {
      const int64_t reach = position + kTokenGroup < tokens ? position + kTokenGroup : tokens;
      length[lane] = trained ? static_cast<int>(first_above(sorted, position, reach, token) - position) : 0;
      break;
    }
    case 4:
    case 5: {
      const int near = threadIdx.x - 4 * kWarp;
      source[near] = tile + near < tokens ? order[tile + near] * features : 0;
      break;
    }
  }
  __syncthreads();
  if (threadIdx.x < kWarp) {
    int64_t pairs = rank[lane] % kTokenGroup == 0 ? entries_of_row(entry_begin[lane], entry_end[lane], width) : 0;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t lower = __shfl_up_sync(0xFFFFFFFFu, pairs, distance);
      if (lane >= distance) pairs += lower;
    }
    pairs_before[lane + 1] = pairs;
    if (lane == 0) pairs_before[0] = 0;
  }
  __syncthreads();
  for (int64_t pair = threadIdx.x; pair < pairs_before[kTile]; pair += kThreads) {
    const int group = static_cast<int>(first_above(pairs_before, 0, kTile, pair)) - 1;
    const int64_t offset = pair - pairs_before[group];
    const int64_t entry = entry_begin[group] + offset;
    const T* column = grad_output + column_of(indices[entry], row_start[group], features);
    const int count = length[group];
    float sum = 0.f;
#pragma unroll 8
    for (int t = 0; t < count; ++t) sum += to_float(column[source[group + t]]);
    if (rank[group] == 0)
      out[entry] = sum;
    else
      partial[blockIdx.x * width + offset] = sum;
  }
}

template <class I, class Token>
__global__ void __launch_bounds__(kThreads)
    join_groups_kernel(const Token* __restrict__ sorted, const I* __restrict__ indices, float* __restrict__ out,
                       const float* __restrict__ partial, int64_t tokens, int64_t features, int64_t nnz, int64_t width,
                       int64_t padding) {
  __shared__ int64_t run_begin, run_end, entry_begin, entry_end;

  const int64_t position = int64_t{blockIdx.x} * kTile + threadIdx.x;
  const bool starts = threadIdx.x < kTile && position + kTokenGroup < tokens &&
                      sorted[position] == sorted[position + kTokenGroup] &&
                      (position == 0 || sorted[position - 1] != sorted[position]) &&
                      is_trained_row(sorted[position], indices[nnz - 1], features, padding);
  if (starts) run_begin = position;  // a run of more than 32 leaves no room for the start of another
  if (!__syncthreads_or(starts)) return;
  const int64_t token = sorted[run_begin];
  if (threadIdx.x == 0 * kWarp) entry_begin = first_not_below(indices, 0, nnz, token * features);
  if (threadIdx.x == 1 * kWarp) entry_end = first_not_below(indices, 0, nnz, (token + 1) * features);
  if (threadIdx.x == 2 * kWarp) run_end = first_above(sorted, run_begin, tokens, token);
  __syncthreads();
  const int64_t groups = (run_end - run_begin + kTokenGroup - 1) / kTokenGroup;
  const int64_t entries = entries_of_row(entry_begin, entry_end, width);
  for (int64_t offset = threadIdx.x; offset < entries; offset += kThreads) {
    const float* part = partial + blockIdx.x * width + offset;
    float sum = out[entry_begin + offset];
#pragma unroll 8
    for (int64_t k = 1; k < groups; ++k) sum += part[k * width];
    out[entry_begin + offset] = sum;
  }
}

}  // namespace

int64_t embedding_grad_partial(int64_t tokens, int64_t features, int64_t nnz) {
  return tokens > kTokenGroup ? tiles_of(tokens) * partial_width(features, nnz) : 0;
}

cudaError_t embedding_grad(const void* grad_output, DType dtype, Tokens tokens, Indices indices, float* out, float* partial,
                           int64_t features, cudaStream_t stream) {
  if (indices.nnz == 0 || tokens.count == 0) return cudaSuccess;
  const int64_t width = partial_width(features, indices.nnz);
  const dim3 grid(static_cast<unsigned>(tiles_of(tokens.count)));
  return with_types(dtype, indices.type, [&](auto element, auto index) {
    using T = decltype(element);
    using I = decltype(index);
    return with_index(tokens.type, [&](auto token) {
      using Token = decltype(token);
      const auto* sorted = static_cast<const Token*>(tokens.sorted);
      const auto* positions = static_cast<const I*>(indices.data);
      SPRAND_LAUNCH((sum_groups_kernel<T, I, Token>), grid, kThreads, 0, stream, static_cast<const T*>(grad_output), sorted,
                    tokens.order, positions, out, partial, tokens.count, features, indices.nnz, width, tokens.padding);
      const cudaError_t error = cudaGetLastError();
      if (error != cudaSuccess || tokens.count <= kTokenGroup) return error;
      SPRAND_LAUNCH((join_groups_kernel<I, Token>), grid, kThreads, 0, stream, sorted, positions, out, partial, tokens.count,
                    features, indices.nnz, width, tokens.padding);
      return cudaGetLastError();
    });
  });
}

}  // namespace sprand::cuda
