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

#include "granule.cuh"
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
  bool long_indices;
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
  // Words of 32 bits: of a 64-bit index the lower half, which tells the column as well.
  const uint32_t* const positions = static_cast<const uint32_t*>(args.indices);
  const auto position_of = [&](int64_t entry) -> uint32_t { return __ldg(positions + (entry << args.long_indices)); };
  const auto inside_window = [&](uint32_t column) -> uint32_t { return column < static_cast<uint32_t>(args.width) ? column : 0; };
  const uint32_t row_words = static_cast<uint32_t>(in), window_word = static_cast<uint32_t>(first_column);

  // Aligned: the rows of a warp follow each other, kGroup to a lane, in blocks of 32 * kGroup.
  const int64_t warp_row = lane_row - kGroup * lane;
  const auto row_of = [&](int m) -> int64_t { return lane_row + 32 * kGroup * (m / kGroup) + m % kGroup; };
  // The entries of a row that this window serves.
  struct Span {
    int first, count;
  };
  const auto span_of = [&](int64_t row) -> Span {
    const int64_t held = row < out ? row : out - 1;
    const int64_t first = __ldg(args.table + held) + int64_t{window} * args.ranks, end = __ldg(args.table + held + 1);
    const int64_t last = end < args.nnz ? end : args.nnz, most = args.ranks < kSlots ? args.ranks : kSlots;
    const int64_t count = last - first < most ? last - first : most;
    return {static_cast<int>(first), row < out && first >= 0 && count > 0 ? static_cast<int>(count) : 0};
  };
  // Ordered: the table tells the row of each m and the entry of each slot of a lane.
  const int32_t* const tile_rows = args.table + args.tiles + int64_t{block} * kRows * kThreads + tid;
  const int32_t* const tile_entries =
      args.table + args.tiles + int64_t{args.tiles} * kRows * kThreads + int64_t{block} * kRows * kSlots * kThreads + tid;
  // Both are read again when they are needed again: no register holds them meanwhile.
  const auto listed_row = [&](int m) -> int64_t {
    const int64_t row = tile_rows[m * kThreads];
    return row < 0 ? 0 : row < out ? row : out - 1;
  };
  const auto listed_entry = [&](int m, int slot) -> int64_t {  // or -1
    const int64_t entry = tile_entries[(m * kSlots + slot) * kThreads];
    return entry < args.nnz ? entry : -1;
  };

  // The column of each slot, before anything needs it. All loads of a batch come before the first use: they wait together.
  uint16_t* const offsets = reinterpret_cast<uint16_t*>(shared + 2 * kStage);
  const auto fill_offsets = [&]() {
    const auto put = [&](int owner, int s, uint32_t column) {
      offsets[(s / 8 * kThreads + owner) * 8 + s % 8] = static_cast<uint16_t>(inside_window(column) * 16);
    };
    if constexpr (kOrdered) {
      constexpr int kBytes = kRows * kSlots * 4 * 32;  // of a warp's share of the entries
      prefetch(reinterpret_cast<const char*>(tile_entries - tid) + warp * kBytes, kBytes);
#pragma unroll 4
      for (int m = 0; m < kRows; ++m) {
        const uint32_t before = static_cast<uint32_t>(listed_row(m)) * row_words + window_word;
        int64_t entry[kSlots];
        uint32_t position[kSlots];
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) entry[slot] = listed_entry(m, slot);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot) position[slot] = position_of(entry[slot] < 0 ? 0 : entry[slot]);
#pragma unroll
        for (int slot = 0; slot < kSlots; ++slot)
          put(tid, m * kSlots + slot, entry[slot] < 0 ? lane & 7 : position[slot] - before);
      }
    } else {  // the lanes of a warp take neighbouring entries, whoever owns them: full lines
      if (warp_row < out) {
        constexpr int64_t kMost = 4096;  // entries to ask for
        const int64_t last_row = warp_row + 32 * kRows < out ? warp_row + 32 * kRows : out;
        const int64_t first = __ldg(args.table + warp_row), end = __ldg(args.table + last_row);
        const int64_t rest = (end < args.nnz ? end : args.nnz) - first, count = rest < kMost ? rest : kMost;
        if (first >= 0 && count > 0)
          prefetch(positions + (first << args.long_indices), static_cast<int>(count << (2 + args.long_indices)));
      }
      constexpr int kUnits = kRows / kUnit, kBatch = 12;
#pragma unroll 1
      for (int first = 0; first < kUnits * kSlots; first += kBatch) {
        Span span[kBatch];
        uint32_t position[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) span[k] = span_of(warp_row + ((first + k) * 32 + lane) / kSlots * kUnit);
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          const int slot = ((first + k) * 32 + lane) % kSlots;
          position[k] = position_of(slot < span[k].count ? span[k].first + slot : 0);
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (first + k >= kUnits * kSlots) continue;
          const int item = (first + k) * 32 + lane, slot = item % kSlots, row = item / kSlots * kUnit;
          const int owner = row / kGroup % 32, m = row / (32 * kGroup) * kGroup + row % kGroup;
          const uint32_t before = static_cast<uint32_t>(warp_row + row) * row_words + window_word;
          put(warp * 32 + owner, m / kUnit * kSlots + slot, slot < span[k].count ? position[k] - before : owner & 7);
        }
      }
    }
  };

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

  // Of the groups of rows of a lane, so many are in registers before they are multiplied: a whole tile where the sums leave room.
  // No branch stands around the loads: the compiler would wait for them at its end.
  constexpr int kGroups = kRows / kGroup, kFew = std::is_same_v<E, __half> ? 4 : 8;  // slots; halves take more registers
  constexpr int kAhead = kOrdered ? 4 : kGroups <= 2 || kSlots <= kFew ? kGroups : kSlots <= 8 ? 2 : 1;
  static_assert(kGroups % kAhead == 0);
  using Loaded = std::conditional_t<kGroup == 1, typename G::One, Pair>;
  constexpr int kLoads = kGroup == 1 ? 1 : kGroup / 2;
  Loaded grads[kAhead][kTokens][kLoads];
  const uint32_t last_at = static_cast<uint32_t>(out - kGroup) * sizeof(E);
  const char* grads_tile = reinterpret_cast<const char*>(grad_output + begin * out);  // the tile multiplied now
  const auto load_grads = [&](int group, const char* tile) {
    uint32_t at;
    if constexpr (kOrdered) {
      at = static_cast<uint32_t>(listed_row(group)) * sizeof(E);
    } else {  // what the sums of a row behind the last one become is written nowhere
      at = static_cast<uint32_t>(lane_row + 32 * kGroup * group) * sizeof(E);
      at = at < last_at ? at : last_at;
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
#pragma unroll
      for (int i = 0; i < kLoads; ++i) grads[group % kAhead][t][i] = __ldg(reinterpret_cast<const Loaded*>(tile + at) + i);
      at += out_bytes;
    }
  };

  const bool idle = !kOrdered && warp_row >= out;  // the same for all lanes of a warp
  const uint4* const packed = reinterpret_cast<const uint4*>(offsets) + tid;
  const auto multiply = [&](const unsigned char* stage, bool more) {
    if (idle) return;
    const char* const next_tile = more ? grads_tile + int64_t{kTokens} * out_bytes : grads_tile;
    uint4 pack = {};
#pragma unroll
    for (int unit = 0; unit < kRows / kUnit; ++unit) {
      float a[kUnit][kTokens];
#pragma unroll
      for (int u = 0; u < kUnit; ++u) {
        const int member = (unit * kUnit + u) % kGroup, held = (unit * kUnit + u) / kGroup % kAhead;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
          if constexpr (kGroup == 1)
            a[u][t] = G::value(grads[held][t][0]);
          else
            a[u][t] = G::value(grads[held][t][member / 2], member % 2);
        }
      }
      if ((unit + 1) * kUnit % kGroup == 0) {  // the group is used up: its registers take the one that is kAhead behind it
        const int next = (unit + 1) * kUnit / kGroup - 1 + kAhead;
        load_grads(next % kGroups, next < kGroups ? grads_tile : next_tile);
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
    grads_tile = next_tile;
  };

  if (tiles > 0) {
    load_input();
#pragma unroll
    for (int group = 0; group < kAhead; ++group) load_grads(group, grads_tile);
  }
  fill_offsets();
  if (tiles > 0) store_input(shared);
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
  __syncthreads();  // the stages are read no more
  if constexpr (kOrdered) {
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      int64_t entry[kSlots];
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) entry[slot] = listed_entry(m, slot);
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot)
        if (entry[slot] >= 0) sums[entry[slot]] = acc[m * kSlots + slot];
    }
  } else {  // row by row of each lane, turned so that neighbouring lanes write neighbouring entries
    constexpr int kStride = kSlots | 1;
    static_assert(kThreads * kStride * 4 <= 2 * kStage);
    float* const turned = reinterpret_cast<float*>(shared) + warp * 32 * kStride;
    Span span[kRows];
#pragma unroll
    for (int m = 0; m < kRows; ++m) span[m] = span_of(row_of(m));
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
#pragma unroll
      for (int slot = 0; slot < kSlots; ++slot) turned[lane * kStride + slot] = acc[m * kSlots + slot];
      __syncwarp();
      float* to[kSlots];
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const int owner = (k * 32 + lane) / kSlots, slot = (k * 32 + lane) % kSlots;
        const int first = __shfl_sync(0xFFFFFFFFu, span[m].first, owner), count = __shfl_sync(0xFFFFFFFFu, span[m].count, owner);
        to[k] = slot < count ? sums + first + slot : nullptr;
      }
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        const int owner = (k * 32 + lane) / kSlots, slot = (k * 32 + lane) % kSlots;
        if (to[k] != nullptr) *to[k] = turned[owner * kStride + slot];
      }
      __syncwarp();
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
