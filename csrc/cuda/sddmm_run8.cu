// sddmm_run8: out[p] = sum over t of grad_output[t, row p] * input[t, column p], for runs of 8 adjacent columns, on tensor cores.
//
// Contract: bfloat16 or float16, both inputs contiguous and token-major; in_features and the first column of a run are multiples
// of 8; any tokens and out_features. Sums in float32: 16 tokens at a time by one mma, these in order of tokens, splits in order
// of tokens, so a schedule gives the same bits in every run. No atomics. Whatever the table holds, nothing outside is touched.
//
// Grid: x walks the schedule's units, that is a block of rows times a range of columns with at most 16 x 16 tiles; y walks the
// splits of the tokens, so that blocks of one split share their tokens in L2. 16 warps; a warp holds up to 16 tiles.
//
// A tile is 16 rows that have a run in the same group of 8 columns: one m16n8k16 per 16 tokens, all 128 sums wanted. A is 16
// columns of grad_output, gathered by ldmatrix, which takes one address per row of 8 tokens. So grad_output is turned on its way
// to shared memory, through registers, into granules of 8 tokens of one row; two halves make 16 tokens. Input stays token-major
// and comes by cp.async, its rows padded by one granule so that ldmatrix.trans meets 8 different banks; the schedule turns
// the places of 16 rows each, and orders the rows of a tile, for the same end. Two stages: while one is multiplied, the next one
// arrives.
//
// Bound: L2. A unit reads (rows + columns) x 32 bytes per 16 tokens, which is why blocks are as large as shared memory allows.
#include <type_traits>

#include "../emulator/mma_host.h"
#include "kernel.cuh"
#include "sddmm_run8.h"

#if defined(__CUDACC__)
#include <cuda_pipeline.h>
#endif

namespace sprand::cuda {
namespace {

constexpr int kWarps = 16;
constexpr int kThreads = 32 * kWarps;
constexpr int kTiles = 16;  // per warp
constexpr int kTokens = 16;
constexpr int kGranule = 16;  // bytes: 8 tokens of a row, or 8 columns of a token

constexpr int64_t kMostSplits = 64;
constexpr int64_t kStepsPerSplit = 4;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Run8Problem {
  const int32_t* table;
  float* out;
  int64_t out_features, in_features, nnz;
  int tokens, split_tokens, units, tiles, rows;
  bool paired;  // neighbouring rows of grad_output can be read as one 32-bit word
};

template <int kRows, int kColumns>
struct Stage {
  static constexpr int kHalf = kRows * kGranule;
  static constexpr int kToken = kColumns * 2 + kGranule;
  static constexpr int kInput = 2 * kHalf;
  static constexpr int kBytes = kInput + kTokens * kToken;
  static_assert(kToken / kGranule % 2 == 1, "an even stride would meet the same banks twice");
};

__device__ __forceinline__ int least(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int most(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xFFFFu) | b << 16; }
__device__ __forceinline__ uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xFFFF0000u); }

// The values of two neighbouring rows, from `from` on, for the first `tokens` of 8 tokens; zero for the others.
__device__ __forceinline__ void load_pair(uint32_t (&pair)[8], const uint16_t* __restrict__ from, int64_t out_features, int rows,
                                          int tokens, bool paired) {
  if (paired && rows >= 2 && tokens >= 8) {
#pragma unroll
    for (int k = 0; k < 8; ++k, from += out_features) pair[k] = __ldg(reinterpret_cast<const uint32_t*>(from));
    return;
  }
#pragma unroll
  for (int k = 0; k < 8; ++k, from += out_features) {
    pair[k] = 0;
    if (k < tokens && rows >= 1) pair[k] = __ldg(from);
    if (k < tokens && rows >= 2) pair[k] |= static_cast<uint32_t>(__ldg(from + 1)) << 16;
  }
}

// Two granules, one per row. Of 8 lanes the upper 4 write their odd row first, so that the 8 meet 8 different banks.
__device__ __forceinline__ void store_pair(unsigned char* half, const uint32_t (&pair)[8], int first_row, uint32_t turn) {
  uint4 even, odd;
  even.x = low_halves(pair[0], pair[1]), odd.x = high_halves(pair[0], pair[1]);
  even.y = low_halves(pair[2], pair[3]), odd.y = high_halves(pair[2], pair[3]);
  even.z = low_halves(pair[4], pair[5]), odd.z = high_halves(pair[4], pair[5]);
  even.w = low_halves(pair[6], pair[7]), odd.w = high_halves(pair[6], pair[7]);
  const bool swapped = threadIdx.x >> 2 & 1;
  uint4* granules = reinterpret_cast<uint4*>(half);
  granules[(first_row + swapped) ^ turn] = swapped ? odd : even;
  granules[(first_row + !swapped) ^ turn] = swapped ? even : odd;
}

template <class T, int kRows, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    sddmm_run8_kernel(const uint16_t* __restrict__ grad_output, const uint16_t* __restrict__ input, Run8Problem at) {
  using S = Stage<kRows, kColumns>;
  constexpr int kParts = kRows / kThreads;  // of a step: in each a thread brings one pair of rows for 8 tokens
  static_assert(kRows % kThreads == 0 && kTiles % kParts == 0);
  SPRAND_DYN_SMEM(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  const int4* units = reinterpret_cast<const int4*>(at.table);
  const int4 unit = __ldg(units + blockIdx.x);
  const int row_begin = most(unit.x, 0), column_begin = most(unit.y, 0) & ~7;
  const int first_tile = most(least(unit.w, at.tiles), 0);
  const int last_tile = most(least(__ldg(units + blockIdx.x + 1).w, at.tiles), 0);
  const int unit_tiles = most(0, least(last_tile - first_tile, kWarps * kTiles));
  const int first = first_tile + unit_tiles * warp / kWarps;
  const int count = unit_tiles * (warp + 1) / kWarps - unit_tiles * warp / kWarps;
  const int32_t* runs = at.table + 4 * (int64_t{at.units} + 1);
  const int16_t* rows = reinterpret_cast<const int16_t*>(runs + 16 * int64_t{at.tiles});
  const int32_t* groups = runs + 24 * int64_t{at.tiles};
  const int32_t* turns = groups + at.tiles + int64_t{blockIdx.x} * (at.rows / kGranule);

  const int rows_here = least(at.rows, static_cast<int>(at.out_features) - row_begin);
  const int granules = least(least(unit.z, kColumns), static_cast<int>(at.in_features) - column_begin) / 8;
  const int begin = blockIdx.y * at.split_tokens;  // at most tokens + 16 x splits
  const int tokens = least(at.split_tokens, at.tokens - begin);
  grad_output += begin * at.out_features + row_begin;
  input += begin * at.in_features + column_begin;

  const auto load_input = [&](int token, unsigned char* stage) {
    static_assert(kWarps == kTokens);  // one warp, one token
    const bool there = token + warp < tokens;
    const uint16_t* from = input + (token + warp) * at.in_features;
    unsigned char* to = stage + S::kInput + warp * S::kToken;
    for (int g = lane; g < granules; g += 32) {
      if (there) {
        __pipeline_memcpy_async(to + g * kGranule, from + g * 8, kGranule);
      } else {
        *reinterpret_cast<uint4*>(to + g * kGranule) = uint4{0, 0, 0, 0};
      }
    }
    __pipeline_commit();
  };
  const auto prefetch_tokens = [&](int token) {
    uint32_t line = token + warp;
    forget(line);
    if (static_cast<int>(line) < tokens) prefetch(grad_output + line * at.out_features, 2 * rows_here);
  };
  prefetch_tokens(0);
  prefetch_tokens(kTokens);
  if (tokens > 0) load_input(0, memory);

  // All loads of the table come before the first use: they wait together, and beside the first tokens. A tile behind the last is
  // read as the last, and not used.
  uint32_t table_row[kTiles], table_group[kTiles];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile = least(first + i, at.tiles - 1);
    table_row[i] = static_cast<uint16_t>(__ldg(rows + 16 * tile + lane % 16));
    table_group[i] = static_cast<uint32_t>(__ldg(groups + tile));
  }
  uint32_t row_of[kTiles / 2] = {};    // byte offsets of this lane's row in tiles 2i and 2i + 1
  uint32_t group_of[kTiles / 4] = {};  // column groups of tiles 4i .. 4i + 3
  uint32_t marks = 0;                  // bit i: tile i is in another group than the one before
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    if (i >= count) continue;
    const uint32_t row = table_row[i] % kRows, group = table_group[i] % (kColumns / 8);
    row_of[i / 2] |= row * kGranule << 16 * (i % 2);
    group_of[i / 4] |= group << 8 * (i % 4);
    if (i == 0 || group != (group_of[(i - 1) / 4] >> 8 * ((i - 1) % 4) & 0xFF)) marks |= 1u << i;
  }
  // Its next bits: the turns of the pairs of rows that this thread brings.
  constexpr int kPairs = kParts > 1 ? kParts / 2 : 1;  // in each half
#pragma unroll
  for (int p = 0; p < kPairs; ++p) {
    const int row = (threadIdx.x + p * kThreads) % (kRows / 2) * 2;
    if (row < at.rows) marks |= (__ldg(turns + row / kGranule) & 7u) << (kTiles + 3 * p);
  }
  float sum[kTiles][4] = {};
  uint32_t pair[8];
  const auto load_grad = [&](int token, int part) {
    uint32_t thread = threadIdx.x;
    forget(thread);
    const int item = thread + part * kThreads, half = item / (kRows / 2), row = item % (kRows / 2) * 2;
    if (row >= at.rows) return;
    token += 8 * half;
    load_pair(pair, grad_output + token * at.out_features + row, at.out_features, rows_here - row, tokens - token, at.paired);
  };
  const auto store_grad = [&](unsigned char* stage, int part) {
    const int item = threadIdx.x + part * kThreads, half = item / (kRows / 2), row = item % (kRows / 2) * 2;
    if (row < at.rows) store_pair(stage + half * S::kHalf, pair, row, marks >> (kTiles + 3 * (part % kPairs)) & 7);
  };
  const uint32_t grad_lane = mma::shared_address(memory) + lane / 16 * S::kHalf;
  const uint32_t input_lane = mma::shared_address(memory) + S::kInput + lane % 16 * S::kToken;
  uint32_t columns[2];
  const auto multiply = [&](uint32_t stage, int part) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if (i / (kTiles / kParts) != part) continue;
      if (i >= count) break;
      if (marks >> i & 1) {
        mma::ldmatrix_x2_trans(columns, stage + input_lane + (group_of[i / 4] >> 8 * (i % 4) & 0xFF) * kGranule);
      }
      uint32_t gathered[4];
      mma::ldmatrix_x4(gathered, stage + grad_lane + (row_of[i / 2] >> 16 * (i % 2) & 0xFFFF));
      mma::m16n8k16<T>(sum[i], gathered, columns);
    }
  };

  if (tokens > 0) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      load_grad(0, part);
      store_grad(memory, part);
    }
    __pipeline_wait_prior(0);
    __syncthreads();
  }
  int stage = 0;  // where in memory, in bytes
#pragma unroll 1
  for (int next = kTokens; next - kTokens < tokens; next += kTokens, stage = S::kBytes - stage) {
    for (uint32_t& packed : row_of) forget(packed);
    for (uint32_t& packed : group_of) forget(packed);
    forget(marks);
    prefetch_tokens(next + kTokens);
    if (next < tokens) load_input(next, memory + S::kBytes - stage);
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
      if (next < tokens) load_grad(next, part);
      multiply(stage, part);
      if (next < tokens) store_grad(memory + S::kBytes - stage, part);
    }
    __pipeline_wait_prior(0);
    __syncthreads();
  }

  const int64_t last_run = at.nnz / 8;
  float* out = at.out + blockIdx.y * at.nnz;
  uint32_t first_here = first;
  forget(first_here);  // or what the loads above were addressed by stays in registers around the loop
  int run[kTiles][2];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t tile = least(static_cast<int>(first_here) + i, at.tiles - 1);
#pragma unroll
    for (int below = 0; below < 2; ++below) run[i][below] = __ldg(runs + 16 * tile + 8 * below + lane / 4);
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int below = 0; below < 2; ++below) {
      if (i >= count || run[i][below] < 0 || run[i][below] >= last_run) continue;
      *reinterpret_cast<float2*>(out + 8 * int64_t{run[i][below]} + lane % 4 * 2) =
          float2{sum[i][2 * below], sum[i][2 * below + 1]};
    }
  }
}

// One thread per 4 entries of the result.
__global__ void __launch_bounds__(kEntryThreads)
    sum_run8_splits_kernel(const float4* __restrict__ partial, float4* __restrict__ out, int64_t quads, int splits) {
  const int64_t quad = entry_of_thread();
  if (quad >= quads) return;
  float4 sum = partial[quad];
#pragma unroll 8
  for (int s = 1; s < splits; ++s) {
    const float4 part = partial[s * quads + quad];
    sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
  }
  out[quad] = sum;
}

// f(rows, columns): the shapes of sprand/kernels/run8_units.py, by number.
template <class F>
cudaError_t with_shape(int64_t shape, F&& f) {
  switch (shape) {
    case 0:
      return f(std::integral_constant<int, 2048>{}, std::integral_constant<int, 1408>{});
    case 1:
      return f(std::integral_constant<int, 1024>{}, std::integral_constant<int, 1472>{});
    case 2:
      return f(std::integral_constant<int, 512>{}, std::integral_constant<int, 1024>{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace

int64_t sddmm_run8_splits(int64_t tokens, const Run8Schedule& schedule, int64_t nnz) {
  const int64_t steps = ceil_div(tokens, kTokens);
  const int64_t most = steps / kStepsPerSplit < kMostSplits ? steps / kStepsPerSplit : kMostSplits;
  const int64_t processors = schedule.processors < 1 ? 1 : schedule.processors;
  int64_t best = 1, best_cost = 0;
  for (int64_t splits = 1; splits <= most && nnz > 0; ++splits) {
    // In thousandths of a step: the waves of blocks, each with 3 steps to start and to end, and the write and read of the sums.
    const int64_t cost =
        1000 * ceil_div(schedule.units * splits, processors) * (ceil_div(steps, splits) + 3) + splits * nnz / 1400;
    if (splits == 1 || cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

cudaError_t sddmm_run8(const void* grad_output, const void* input, DType dtype, const Run8Schedule& schedule, float* out,
                       float* partial, int64_t tokens, int64_t out_features, int64_t in_features, int64_t nnz,
                       cudaStream_t stream) {
  if (dtype == DType::f32) return cudaErrorNotSupported;
  if (nnz == 0) return cudaSuccess;
  constexpr int64_t limit = (int64_t{1} << 31) - kMostSplits * kTokens;
  const int64_t size = 4 * (schedule.units + 1) + 25 * schedule.tiles + schedule.units * (schedule.rows / kGranule);
  if (nnz < 0 || nnz % 8 || in_features % 8 || in_features >= limit || out_features >= limit || tokens >= limit ||
      schedule.units < 1 || schedule.units >= limit || schedule.tiles < 1 || schedule.tiles >= limit ||
      schedule.table_size != size || schedule.rows < 1) {
    return cudaErrorInvalidValue;
  }
  for (const void* loaded : {input, static_cast<const void*>(schedule.table)}) {
    if (reinterpret_cast<uintptr_t>(loaded) % kGranule) return cudaErrorMisalignedAddress;
  }
  const int64_t splits = sddmm_run8_splits(tokens, schedule, nnz);
  const Run8Problem problem = {
      .table = schedule.table,
      .out = splits > 1 ? partial : out,
      .out_features = out_features,
      .in_features = in_features,
      .nnz = nnz,
      .tokens = static_cast<int>(tokens),
      .split_tokens = static_cast<int>(ceil_div(ceil_div(tokens, splits), kTokens) * kTokens),
      .units = static_cast<int>(schedule.units),
      .tiles = static_cast<int>(schedule.tiles),
      .rows = static_cast<int>(schedule.rows),
      .paired = out_features % 2 == 0 && reinterpret_cast<uintptr_t>(grad_output) % 4 == 0,
  };
  const dim3 grid(static_cast<unsigned>(schedule.units), static_cast<unsigned>(splits));
  const cudaError_t error = with_shape(schedule.shape, [&](auto rows, auto columns) {
    constexpr int kBytes = 2 * Stage<rows(), columns()>::kBytes;
    if (schedule.rows > rows() || schedule.rows % kGranule) return cudaErrorInvalidValue;
    const auto launch = [&](auto kernel) {
      const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
      if (allowed != cudaSuccess) return allowed;
      SPRAND_LAUNCH(kernel, grid, kThreads, kBytes, stream, static_cast<const uint16_t*>(grad_output),
                    static_cast<const uint16_t*>(input), problem);
      return cudaGetLastError();
    };
    return dtype == DType::bf16 ? launch(sddmm_run8_kernel<__nv_bfloat16, rows(), columns()>)
                                : launch(sddmm_run8_kernel<__half, rows(), columns()>);
  });
  if (error != cudaSuccess || splits == 1) return error;
  SPRAND_LAUNCH(sum_run8_splits_kernel, entry_grid(nnz / 4), kEntryThreads, 0, stream, reinterpret_cast<const float4*>(partial),
                reinterpret_cast<float4*>(out), nnz / 4, static_cast<int>(splits));
  return cudaGetLastError();
}

}  // namespace sprand::cuda
