// Runs CUDA kernels on the CPU for tests: one fiber (ucontext) per CUDA thread, blocks one after the other.
//
// The same .cu source compiles under nvcc and, with this header, under g++. Rules for the source: launch with SPRAND_LAUNCH, take
// dynamic shared memory from SPRAND_DYN_SMEM, keep inline PTX behind a function that has a host branch. A large parameter is
// declared SPRAND_GRID_CONSTANT(type): one copy for the whole grid.
// Emulated is what the kernels use: thread and block indices, static and dynamic __shared__, barriers of blocks and warps,
// shuffles, __ldg, cp.async (as an immediate copy), half and bfloat16 (the toolkit's own host code). It reports a barrier that
// some threads never reach, a warp operation whose mask leaves its caller out, a store behind the dynamic shared memory, and a
// launch the device would refuse; simt::order brings out missing barriers. It cannot show timing, memory ordering, or the
// hardware's approximate functions. One operating-system thread, not re-entrant.
#pragma once

#if defined(__CUDACC__)

#define SPRAND_LAUNCH(kernel, grid, block, smem, stream, ...) kernel<<<(grid), (block), (smem), (stream)>>>(__VA_ARGS__)
#define SPRAND_DYN_SMEM(name) extern __shared__ __align__(16) unsigned char name[]
#define SPRAND_GRID_CONSTANT(type) const __grid_constant__ type

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>  // types only; nothing of the runtime is called
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#undef __shared__
#define __shared__ static  // blocks run one after the other, so one copy is right
#undef __launch_bounds__
#define __launch_bounds__(...)

namespace simt {

constexpr size_t kStackBytes = 64 * 1024;
constexpr size_t kGuardBytes = 64;
constexpr unsigned char kPoison = 0xCD;

// The order in which threads run between barriers: 0 ascending, 1 descending, any other number a stride walk. A kernel
// that misses a barrier gives another result under one of them.
inline int order = 0;

inline int64_t launches = 0;  // of the process

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 index;
  int rank = 0;
  bool done = false;
};

struct Barrier {
  int arrived = 0;
  uint64_t generation = 0;
  bool any = false;     // whether the predicate of a thread of the open generation is true
  bool result = false;  // that of the last finished generation
};

struct Warp {
  uint32_t waiting = 0;
  alignas(16) unsigned char slot[32][16];
};

struct Block {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barrier;
  dim3 grid, block;
  uint3 index;
  std::vector<unsigned char> shared;
  size_t shared_bytes = 0;
  std::function<void()> body;
  std::string error;
  int live = 0, current = 0;
  uint64_t progress = 0;  // grows whenever a thread arrives somewhere; standing still means deadlock
};

inline Block* running = nullptr;

inline Fiber& self() { return running->fibers[running->current]; }
inline int lane() { return self().rank & 31; }
inline Warp& warp() { return running->warps[self().rank >> 5]; }

inline void yield() {
  Fiber& fiber = self();
  swapcontext(&fiber.context, &running->scheduler);
}

inline void fail(const std::string& message) {
  running->error = message;
  yield();  // the scheduler throws and never comes back
}

inline void release_if_complete(Barrier& b) {
  if (b.arrived == 0 || b.arrived != running->live) return;
  b.result = b.any;
  b.any = false;
  b.arrived = 0;
  ++b.generation;
}

// Waits for every thread of the block that has not returned; whether the predicate of one of them is true.
inline bool block_barrier(bool predicate = false) {
  Barrier& b = running->barrier;
  const uint64_t generation = b.generation;
  ++running->progress;
  ++b.arrived;
  b.any |= predicate;
  release_if_complete(b);
  while (b.generation == generation) yield();
  return b.result;
}

// Waits for the lanes of `mask`, which may differ between parts of one warp.
inline void warp_barrier(uint32_t mask) {
  Warp& w = warp();
  const uint32_t bit = 1u << lane();
  if (!(mask & bit)) fail("simt: lane " + std::to_string(lane()) + " calls a warp operation whose mask leaves it out");
  ++running->progress;
  w.waiting |= bit;
  if ((w.waiting & mask) == mask) w.waiting &= ~mask;
  while (w.waiting & bit) yield();
}

// Every lane of `mask` shows its value; returns that of lane `source`.
template <class T>
T exchange(uint32_t mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(Warp::slot[0]));
  Warp& w = warp();
  std::memcpy(w.slot[lane()], &value, sizeof(T));
  warp_barrier(mask);
  T result;
  std::memcpy(&result, w.slot[source & 31], sizeof(T));
  warp_barrier(mask);
  return result;
}

inline unsigned char* dynamic_shared() {
  return reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(running->shared.data()) + 15) & ~uintptr_t{15});
}

inline void run_fiber() {
  running->body();
  self().done = true;
  --running->live;
  ++running->progress;
  release_if_complete(running->barrier);
  yield();
}

inline int thread_at(int turn, int threads) {
  if (order == 0) return turn;
  if (order == 1) return threads - 1 - turn;
  return static_cast<int>((int64_t{7919} * turn + order) % threads);  // 7919 is prime and above the largest block
}

inline void start_block(Block& b, uint3 index) {
  const int threads = static_cast<int>(b.fibers.size());
  b.index = index;
  b.warps.assign((threads + 31) / 32, Warp{});
  b.barrier = Barrier{};
  b.live = threads;
  b.shared.assign(15 + b.shared_bytes + kGuardBytes, kPoison);
  for (int i = 0; i < threads; ++i) {
    const unsigned u = i;
    Fiber& f = b.fibers[i];
    f.done = false;
    f.rank = i;
    f.index = uint3{u % b.block.x, u / b.block.x % b.block.y, u / (b.block.x * b.block.y)};
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = kStackBytes;
    f.context.uc_link = &b.scheduler;
    makecontext(&f.context, run_fiber, 0);
  }
}

inline void run_block(Block& b) {
  const int threads = static_cast<int>(b.fibers.size());
  while (b.live) {
    const uint64_t before = b.progress;
    for (int turn = 0; turn < threads; ++turn) {
      b.current = thread_at(turn, threads);
      if (!self().done) swapcontext(&b.scheduler, &self().context);
      if (!b.error.empty()) throw std::runtime_error(b.error);
    }
    if (b.progress == before && b.live) {
      throw std::runtime_error("simt: deadlock: some threads wait at a barrier or warp operation that others never reach");
    }
  }
  for (size_t i = 0; i < kGuardBytes; ++i) {
    if (dynamic_shared()[b.shared_bytes + i] != kPoison) {
      throw std::runtime_error("simt: store behind the dynamic shared memory");
    }
  }
}

inline void launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > 1024 || block.z > 64 || shared_bytes > 227 * 1024 || grid.x < 1 || grid.x > 0x7FFFFFFFu ||
      grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    throw std::runtime_error("simt: a launch configuration that the device refuses");
  }
  ++launches;
  Block b;
  b.grid = grid;
  b.block = block;
  b.shared_bytes = shared_bytes;
  b.body = std::move(body);
  b.fibers.resize(threads);
  for (Fiber& f : b.fibers) f.stack.reset(new char[kStackBytes]);
  struct Running {
    explicit Running(Block* block) { running = block; }
    ~Running() { running = nullptr; }
  } scope(&b);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        start_block(b, uint3{x, y, z});
        run_block(b);
      }
    }
  }
}

}  // namespace simt

#define threadIdx (simt::self().index)
#define blockIdx (simt::running->index)
#define blockDim (simt::running->block)
#define gridDim (simt::running->grid)

inline void __syncthreads() { simt::block_barrier(); }
inline int __syncthreads_or(int p) { return simt::block_barrier(p != 0); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu) { simt::warp_barrier(mask); }

// Shuffles within segments of `width` lanes; a source outside the segment gives back the caller's own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return simt::exchange(mask, value, (simt::lane() & ~(width - 1)) | (source & (width - 1)));
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const int l = simt::lane(), source = l - static_cast<int>(distance);
  return simt::exchange(mask, value, source >= (l & ~(width - 1)) ? source : l);
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t{high} << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return result;
}
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  std::memcpy(to, from, bytes - zeros);
  std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t) {}

#define cudaGetLastError() cudaSuccess  // a launch that fails here throws
#define cudaFuncSetAttribute(kernel, attribute, value) cudaSuccess
#define SPRAND_LAUNCH(kernel, grid, block, smem, stream, ...) \
  (void)(stream), simt::launch(dim3(grid), dim3(block), (smem), [&] { kernel(__VA_ARGS__); })
#define SPRAND_DYN_SMEM(name) unsigned char* name = simt::dynamic_shared()
#define SPRAND_GRID_CONSTANT(type) const type&

#endif
