// The CPU SDDMM driver: result[p] = sum over tokens of grad_output[t, row p] * input[t, column p].
//
// Token-major operands make a sample a walk with two large strides, so blocks of tokens are packed first: input into a
// panel `[in][tokens]` shared by all threads, grad_output into a panel `[rows][tokens]` of each thread's own rows. A
// sample is then the dot product of two contiguous kilobytes. Rows are taken against a block of columns at a time, so
// that both stay in the second-level cache.
//
// Every sample belongs to one thread and adds its token blocks in ascending order: the result does not depend on the
// number of threads. Beside the operands it needs `in` + threads * kRowsAtOnce kilobytes.
#include "sddmm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace sprand::cpu {
namespace {

constexpr int64_t kRowsAtOnce = 512;       // rows of grad_output packed by a thread at a time
constexpr int64_t kColumnsAtOnce = 768;    // columns of input met by these rows before the next columns
constexpr int64_t kPackedColumns = 32;     // columns of a packing task
constexpr int64_t kSamplesPerTask = 256;   // least samples worth a thread

// A panel kept between calls by the thread that uses it, grown when needed.
void* workspace(int slot, int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory[2];
  thread_local int64_t size[2] = {0, 0};
  if (size[slot] < bytes) {
    memory[slot].reset();
    size[slot] = 0;
    memory[slot].reset(std::aligned_alloc(64, bytes));
    if (!memory[slot]) throw std::bad_alloc();
    size[slot] = bytes;
  }
  return memory[slot].get();
}

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

void call_dots(const SddmmKernels& k, const void* row, const void* panel, const int32_t* indices, int64_t n, int64_t origin, int64_t vectors, void* out) {
  k.dots(row, panel, indices, n, origin, vectors, out);
}
void call_dots(const SddmmKernels& k, const void* row, const void* panel, const int64_t* indices, int64_t n, int64_t origin, int64_t vectors, void* out) {
  k.dots_long(row, panel, indices, n, origin, vectors, out);
}

// One token block of samples [p, end) of whole or partial rows: pack their rows, then meet the columns block by block.
template <class Index>
void samples(const SddmmArgs& a, const SddmmKernels& k, const char* grad_block, int64_t tokens, const char* panel, int64_t p, int64_t end) {
  const Index* indices = static_cast<const Index*>(a.indices);
  const int64_t vectors = (tokens + k.lanes - 1) / k.lanes, size = element_size(a.dtype), result_size = a.dtype == DType::f64 ? 8 : 4;
  char* rows = static_cast<char*>(workspace(1, kRowsAtOnce * kPanelBytes));
  char* result = static_cast<char*>(a.result);
  std::vector<int64_t> next;  // first sample of each packed row not met yet
  while (p < end) {
    const int64_t first = indices[p] / a.in, count = std::min({kRowsAtOnce, a.out - first, indices[end - 1] / a.in - first + 1});
    const int64_t stop = std::lower_bound(indices + p, indices + end, (first + count) * a.in) - indices;
    k.pack(grad_block + first * size, a.out, tokens, count, rows);
    next.assign(count, 0);
    for (int64_t r = 0, q = p; r < count; ++r) {
      next[r] = q;
      while (q < stop && indices[q] < (first + r + 1) * a.in) ++q;
    }
    for (int64_t column = 0; column < a.in; column += kColumnsAtOnce) {
      for (int64_t r = 0; r < count; ++r) {
        const int64_t origin = (first + r) * a.in, limit = origin + std::min(a.in, column + kColumnsAtOnce);
        int64_t q = next[r];
        while (q < stop && indices[q] < limit) ++q;
        if (q > next[r]) call_dots(k, rows + r * kPanelBytes, panel, indices + next[r], q - next[r], origin, vectors, result + next[r] * result_size);
        next[r] = q;
      }
    }
    p = stop;
  }
}

}  // namespace

void sddmm(const SddmmArgs& a, const ParallelFor& parallel_for) {
  std::memset(a.result, 0, a.nnz * (a.dtype == DType::f64 ? 8 : 4));
  if (a.nnz == 0 || a.tokens == 0) return;
  const SddmmKernels k = sddmm_kernels(a.dtype);
  const int64_t size = element_size(a.dtype), groups = (a.in + kPackedColumns - 1) / kPackedColumns;
  char* panel = static_cast<char*>(workspace(0, a.in * kPanelBytes));
  for (int64_t token = 0; token < a.tokens; token += k.tokens) {
    const int64_t tokens = std::min(k.tokens, a.tokens - token);
    const char* input_block = static_cast<const char*>(a.input) + token * a.in * size;
    const char* grad_block = static_cast<const char*>(a.grad_output) + token * a.out * size;
    parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
      const int64_t column = begin * kPackedColumns, columns = std::min(a.in, end * kPackedColumns) - column;
      k.pack(input_block + column * size, a.in, tokens, columns, panel + column * kPanelBytes);
    });
    parallel_for(0, a.nnz, kSamplesPerTask, [&](int64_t begin, int64_t end) {
      if (a.long_indices) samples<int64_t>(a, k, grad_block, tokens, panel, begin, end);
      else samples<int32_t>(a, k, grad_block, tokens, panel, begin, end);
    });
  }
}

}  // namespace sprand::cpu
