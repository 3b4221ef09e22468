// Kernels for the tests of the emulator: right ones, and ones with the mistakes it must find.
#pragma once
#include <cstdint>

#include "../emulator/simt_host.h"

namespace emulator_tests {

constexpr int kThreads = 96;

// Sum of n floats per block: warp shuffles, then the warps' sums in dynamic shared memory.
__global__ void block_sum(const float* values, float* sums, int n) {
  SPRAND_DYN_SMEM(memory);
  float* warp_sums = reinterpret_cast<float*>(memory);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = i < n ? values[i] : 0.f;
  for (int offset = 1; offset < 32; offset *= 2) {
    const float before = __shfl_up_sync(0xFFFFFFFFu, sum, offset);
    if (lane >= offset) sum += before;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  sum = 0.f;
  for (int w = 0; w < warps; ++w) sum += warp_sums[w];
  sums[blockIdx.x] = sum;
}

// Block by block, for each of its threads, whether a value of the block is above a bound.
__global__ void any_above(const float* values, float bound, int* answers) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  answers[i] = __syncthreads_or(values[i] > bound);
}

// Each half of a warp rotates its values by one lane on its own; the halves run a different number of rounds.
__global__ void rotate_halves(int* values) {
  const bool upper = threadIdx.x % 32 >= 16;
  const unsigned mask = upper ? 0xFFFF0000u : 0x0000FFFFu;
  int value = values[threadIdx.x];
  for (int round = 0; round < (upper ? 3 : 1); ++round) value = __shfl_sync(mask, value, threadIdx.x + 1, 16);
  values[threadIdx.x] = value;
}

// Reverses a block through shared memory; without the barrier a thread can read what its partner has not written.
template <bool kBarrier>
__global__ void reverse(const int* in, int* out) {
  __shared__ int memory[kThreads];
  memory[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
}

// The same with the buffer used twice; the second barrier keeps the first round's readers ahead of the second's writers.
template <bool kBarrier>
__global__ void reverse_twice(const int* in, int* out) {
  __shared__ int memory[kThreads];
  for (int round = 0; round < 2; ++round) {
    memory[threadIdx.x] = in[round * kThreads + threadIdx.x];
    __syncthreads();
    out[round * kThreads + threadIdx.x] = memory[kThreads - 1 - threadIdx.x];
    if (kBarrier) __syncthreads();
  }
}

__global__ void divergent_barrier() {
  if (threadIdx.x % 2 == 0) __syncthreads();
  while (threadIdx.x % 2 == 1) __syncwarp(0xFFFFFFFFu);
}

__global__ void left_out_of_mask() { __syncwarp(0x0000FFFFu); }

__global__ void store_behind_shared(int words) {
  SPRAND_DYN_SMEM(memory);
  reinterpret_cast<int*>(memory)[words] = 1;
}

__global__ void store(int* out, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) out[i] = i;
}

}  // namespace emulator_tests
