// sddmm, "row in registers": a lane owns whole rows of the weight and keeps the sums of their entries in registers.
//
// Contract: grad_output [T, out] and input [T, in] contiguous, any T, out, in; sums in float32 over tokens in ascending order,
// one chain per entry and split, splits added in order: the same bits in every run. No atomics. Nothing is read or written out of
// bounds, whatever the plan says: columns are held inside the window, entries and rows inside their counts.
//
// Grid: x walks blocks of threads * kRows rows, y the windows of columns, z the splits of the tokens (slowest, so that blocks
// which read the same tokens run together and share them in L2).
//
// Why: an entry needs one value of each operand per token. The input goes through shared memory, transposed in registers into
// granules [column][tokens] of 16 bytes, so that one 128-bit load brings 8 (float32: 4) tokens of a column; the value of
// grad_output is in a register of the lane that owns the row, loaded coalesced (neighbouring lanes own neighbouring rows) and
// never staged. That is 2 bytes of shared memory per multiplication, the bound of this kernel; where `kUnit` rows share their
// columns one load serves them all. A quarter-warp's 128-bit loads are free of bank conflicts if its 8 columns differ modulo 8,
// which the stratified pattern grants (pattern_math.h) and the ordered plan seeks for other masks.
#pragma once
#include <type_traits>

#include "kernel.cuh"
#include "sddmm_rows.h"

namespace sprand::cuda {

struct RowsArgs {
  const void* grad_output;
  const void* input;
  const void* indices;
  const int32_t* table;
  float* sums;                                                   // [splits, nnz]
  int64_t tokens, out_features, in_features, nnz, split_tokens;  // tokens: whole granules
  int tiles, ranks, width;
  bool long_indices, accumulate;
};

// How 16 bytes hold the tokens of one column, and how a pair of neighbouring elements is loaded and split.
template <class E>
struct Granule {  // 16-bit elements
  static constexpr int kTokens = 8;
  using Pair = uint32_t;
  using One = uint16_t;
  static __device__ __forceinline__ uint4 first(const Pair* s) {
    return {__byte_perm(s[0], s[1], 0x5410), __byte_perm(s[2], s[3], 0x5410), __byte_perm(s[4], s[5], 0x5410),
            __byte_perm(s[6], s[7], 0x5410)};
  }
  static __device__ __forceinline__ uint4 second(const Pair* s) {
    return {__byte_perm(s[0], s[1], 0x7632), __byte_perm(s[2], s[3], 0x7632), __byte_perm(s[4], s[5], 0x7632),
            __byte_perm(s[6], s[7], 0x7632)};
  }
  static __device__ __forceinline__ float low(uint32_t w) {
    if constexpr (std::is_same_v<E, __nv_bfloat16>)
      return __uint_as_float(w << 16);
    else
      return __half2float(__ushort_as_half(static_cast<uint16_t>(w)));
  }
  static __device__ __forceinline__ float high(uint32_t w) {
    if constexpr (std::is_same_v<E, __nv_bfloat16>)
      return __uint_as_float(w & 0xFFFF0000u);
    else
      return __half2float(__ushort_as_half(static_cast<uint16_t>(w >> 16)));
  }
  static __device__ __forceinline__ float value(One x) { return low(x); }
  static __device__ __forceinline__ float value(Pair x, bool odd) { return odd ? high(x) : low(x); }
  static __device__ __forceinline__ void unpack(uint4 v, float* x) {
    x[0] = low(v.x), x[1] = high(v.x), x[2] = low(v.y), x[3] = high(v.y);
    x[4] = low(v.z), x[5] = high(v.z), x[6] = low(v.w), x[7] = high(v.w);
  }
};

template <>
struct Granule<float> {
  static constexpr int kTokens = 4;
  using Pair = uint2;
  using One = uint32_t;
  static __device__ __forceinline__ uint4 first(const Pair* s) { return {s[0].x, s[1].x, s[2].x, s[3].x}; }
  static __device__ __forceinline__ uint4 second(const Pair* s) { return {s[0].y, s[1].y, s[2].y, s[3].y}; }
  static __device__ __forceinline__ float value(One x) { return __uint_as_float(x); }
  static __device__ __forceinline__ float value(Pair x, bool odd) { return __uint_as_float(odd ? x.y : x.x); }
  static __device__ __forceinline__ void unpack(uint4 v, float* x) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
};

template <class E, int kThreads, int kRows, int kSlots, int kColumns, int kUnit, bool kOrdered>
__global__ void __launch_bounds__(kThreads, 1) sddmm_rows_kernel(RowsArgs args) {
  using G = Granule<E>;
  using Pair = typename G::Pair;
  constexpr int kTokens = G::kTokens;
  constexpr int kGroup = kOrdered ? 1 : kUnit > 2 ? kUnit : 2;  // neighbouring rows of a lane, loaded together
  constexpr int kPairs = (kColumns / 2 + kThreads - 1) / kThreads;
  constexpr int kStage = kColumns * 16;
  static_assert(kRows % kGroup == 0 && kRows % kUnit == 0 && kColumns <= 4096 && (!kOrdered || kUnit == 1));
  SPRAND_DYN_SMEM(shared);  // two stages of granules [kColumns], then byte offsets [slots / 8][kThreads][8] into a stage

  const E* const grad_output = static_cast<const E*>(args.grad_output);
  const E* const input = static_cast<const E*>(args.input);
  const int64_t out = args.out_features, in = args.in_features;
  const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, block = blockIdx.x, window = blockIdx.y;
  const int64_t begin = blockIdx.z * args.split_tokens, rest = args.tokens - begin;
  const int tiles = static_cast<int>((rest < args.split_tokens ? rest > 0 ? rest : 0 : args.split_tokens) / kTokens);
  const int64_t lane_row = int64_t{block} * kThreads * kRows + warp * (32 * kRows) + kGroup * lane;  // aligned: the first
  const int32_t* const window_begin = args.table + (kOrdered ? 0 : out + 1);
  // Held inside the input for any table, and even, as loads of pairs need it.
  const int64_t wanted_column = window_begin[kOrdered ? block : window], last_column = in - args.width;
  const int64_t first_column = (wanted_column < 0 ? 0 : wanted_column < last_column ? wanted_column : last_column) & ~int64_t{1};
  const int32_t* const tile_rows = args.table + args.tiles + int64_t{block} * kRows * kThreads + tid;
  const int32_t* const tile_entries =
      args.table + args.tiles + int64_t{args.tiles} * kRows * kThreads + int64_t{block} * kRows * kSlots * kThreads + tid;

  const auto row_of = [&](int m) -> int64_t {
    if constexpr (kOrdered) {
      const int64_t row = tile_rows[m * kThreads];
      return row < out ? row : -1;
    } else {
      const int64_t row = lane_row + 32 * kGroup * (m / kGroup) + m % kGroup;
      return row < out ? row : -1;
    }
  };
  // The entry of a slot, or -1.
  const auto entry_of = [&](int m, int slot, int64_t row) -> int64_t {
    if (row < 0) return -1;
    int64_t entry;
    if constexpr (kOrdered) {
      entry = tile_entries[(m * kSlots + slot) * kThreads];
    } else {
      entry = args.table[row] + int64_t{window} * args.ranks + slot;
      if (slot >= args.ranks || entry >= args.table[row + 1]) entry = -1;
    }
    return entry < args.nnz ? entry : -1;
  };

  const auto position_of = [&](int64_t entry) -> int64_t {
    return args.long_indices ? static_cast<const int64_t*>(args.indices)[entry]
                             : static_cast<const int32_t*>(args.indices)[entry];
  };

  uint16_t* const offsets = reinterpret_cast<uint16_t*>(shared + 2 * kStage);
#pragma unroll 1
  for (int unit = 0; unit < kRows / kUnit; ++unit) {
    const int64_t row = row_of(unit * kUnit);
#pragma unroll 1
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t entry = entry_of(unit * kUnit, slot, row);
      int64_t column = entry < 0 ? lane & 7 : position_of(entry) - row * in - first_column;
      if (column < 0 || column >= args.width) column = 0;
      const int s = unit * kSlots + slot;
      offsets[(s / 8 * kThreads + tid) * 8 + s % 8] = static_cast<uint16_t>(column * 16);
    }
  }

  float acc[kRows * kSlots];
#pragma unroll
  for (int s = 0; s < kRows * kSlots; ++s) acc[s] = 0.f;

  // Addresses are a pointer that all threads share, advanced tile by tile, and 32-bit bytes of the lane: one addition per token.
  const uint32_t in_bytes = static_cast<uint32_t>(in * sizeof(E)), out_bytes = static_cast<uint32_t>(out * sizeof(E));
  Pair staged[kPairs][kTokens];
  const char* input_tile = reinterpret_cast<const char*>(input + begin * in);  // the tile to load next
  const auto load_input = [&]() {
    uint32_t at = static_cast<uint32_t>(first_column + 2 * tid) * sizeof(E);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kPairs; ++i)
        if (2 * (tid + i * kThreads) < args.width)
          staged[i][t] = __ldg(reinterpret_cast<const Pair*>(input_tile + (at + 2 * i * kThreads * sizeof(E))));
      at += in_bytes;
    }
    input_tile += int64_t{kTokens} * in_bytes;
  };
  const auto store_input = [&](unsigned char* stage) {
    uint4* const granules = reinterpret_cast<uint4*>(stage);
    const int swap = lane >> 2 & 1;  // the two stores of a quarter-warp then meet even and odd granules alike
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      const int pair = tid + i * kThreads;
      if (2 * pair >= args.width) continue;
      const uint4 first = G::first(staged[i]), second = G::second(staged[i]);
      granules[2 * pair + swap] = swap ? second : first;
      granules[2 * pair + 1 - swap] = swap ? first : second;
    }
  };

  using Loaded = std::conditional_t<kGroup == 1, typename G::One, Pair>;
  constexpr int kLoads = kGroup == 1 ? 1 : kGroup / 2;
  Loaded grads[kTokens][kLoads] = {};
  const char* grads_tile = reinterpret_cast<const char*>(grad_output + begin * out);  // the tile multiplied now, or the next one
  const auto load_grads = [&](int group) {
    const int64_t row = kOrdered ? row_of(group) : lane_row + 32 * kGroup * group;
    if (row < 0 || row >= out) return;  // what the sums of such a row become is written nowhere
    uint32_t at = static_cast<uint32_t>(row) * sizeof(E);
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) grads[t][i] = __ldg(reinterpret_cast<const Loaded*>(grads_tile + at) + i);
      at += out_bytes;
    }
  };

  const bool idle = !kOrdered && lane_row - kGroup * lane >= out;  // the same for all lanes of a warp
  const uint4* const packed = reinterpret_cast<const uint4*>(offsets) + tid;
  const auto multiply = [&](const unsigned char* stage, bool more) {
    if (idle) return;
    uint4 pack;
#pragma unroll
    for (int unit = 0; unit < kRows / kUnit; ++unit) {
      float a[kUnit][kTokens];
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const int member = (unit * kUnit + u) % kGroup;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          if constexpr (kGroup == 1)
            a[u][t] = G::value(grads[t][0]);
          else
            a[u][t] = G::value(grads[t][member / 2], member % 2);
        }
      }
      if ((unit + 1) * kUnit % kGroup == 0) {  // the group is used up: bring the next one
        const int next = (unit + 1) * kUnit / kGroup;
        if (next < kRows / kGroup) {
          load_grads(next);
        } else if (more) {
          grads_tile += int64_t{kTokens} * out_bytes;
          load_grads(0);
        }
      }
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) {
        const int s = unit * kSlots + slot;
        if (s % 8 == 0) pack = packed[s / 8 * kThreads];
        const uint32_t word = s % 8 < 2 ? pack.x : s % 8 < 4 ? pack.y : s % 8 < 6 ? pack.z : pack.w;
        const uint32_t offset = s % 2 ? word >> 16 : word & 0xFFFFu;
        float x[kTokens];
        G::unpack(*reinterpret_cast<const uint4*>(stage + offset), x);
#pragma unroll
        for (int u = 0; u < kUnit; ++u) {
          float sum = acc[(unit * kUnit + u) * kSlots + slot];
#pragma unroll
          for (int t = 0; t < kTokens; ++t) sum = fmaf(a[u][t], x[t], sum);
          acc[(unit * kUnit + u) * kSlots + slot] = sum;
        }
      }
    }
  };

  if (tiles > 0) {
    load_input();
    store_input(shared);
    load_grads(0);
  }
  __syncthreads();
#pragma unroll 1
  for (int left = tiles; left > 0; left -= 2) {
    if (left > 1) load_input();
    multiply(shared, left > 1);
    if (left == 1) break;
    store_input(shared + kStage);
    __syncthreads();
    if (left > 2) load_input();
    multiply(shared + kStage, left > 2);
    if (left > 2) store_input(shared);
    __syncthreads();
  }

  float* const sums = args.sums + blockIdx.z * args.nnz;
#pragma unroll
  for (int m = 0; m < kRows; ++m) {
    const int64_t row = row_of(m);
#pragma unroll
    for (int slot = 0; slot < kSlots; ++slot) {
      const int64_t entry = entry_of(m, slot, row);
      if (entry >= 0) sums[entry] = args.accumulate ? sums[entry] + acc[m * kSlots + slot] : acc[m * kSlots + slot];
    }
  }
}

// Launches the kernel of `variant` for elements E, where the variants of a list are compiled; with null args it only looks.
template <class E, RowsVariant... kVariants>
cudaError_t launch_rows(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream) {
  cudaError_t result = cudaErrorInvalidValue;
  const auto launch = [&]<RowsVariant v>() {
    if (args == nullptr) return cudaSuccess;
    constexpr auto kernel = sddmm_rows_kernel<E, v.threads, v.rows_per_lane, v.slots, v.columns, v.unit, v.ordered>;
    const size_t bytes = rows_shared_bytes(v);
    const cudaError_t error = allow_shared(kernel, bytes);
    if (error != cudaSuccess) return error;
    SPRAND_LAUNCH(kernel, grid, v.threads, bytes, stream, *args);
    return cudaGetLastError();
  };
  ((variant == kVariants ? (void)(result = launch.template operator()<kVariants>()) : void()), ...);
  return result;
}

// One per element type, each in a file of its own to be compiled side by side.
cudaError_t launch_rows_f32(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream);
cudaError_t launch_rows_f16(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream);
cudaError_t launch_rows_bf16(const RowsVariant& variant, const RowsArgs* args, dim3 grid, cudaStream_t stream);

}  // namespace sprand::cuda
