// The CPU SDDMM: what its driver (sddmm.cpp) asks of the inner kernels that exist once per instruction set.
#pragma once
#include <cstdint>
#include <functional>

namespace sprand::cpu {

enum class DType { f32, f64, bf16, f16 };

// Bytes of one packed column or row of a token block: 64 float, 32 double or 128 bf16 tokens, four AVX-512 registers.
// Small, so that the panels of a block (256 bytes a column) stay in the second-level cache while they are filled and used.
constexpr int64_t kPanelBytes = 256;

// The kernels of one panel type. A panel holds columns of a token-major matrix one after the other, kPanelBytes each,
// tokens contiguous and padded with zeros to a multiple of `lanes`.
struct SddmmKernels {
  int64_t tokens;  // tokens of a full block
  int64_t lanes;   // tokens of a vector
  // panel[c] = src[0 .. tokens)[c] for c in [0, cols); src has row stride `stride` in elements.
  void (*pack)(const void* src, int64_t stride, int64_t tokens, int64_t cols, void* panel);
  // out[r * stride + p] += <rows[r], panel[indices[p] - origin]> over `vectors` vectors, for r in [0, count) and p in [0, n);
  // `count` packed rows one after the other: 1, 2 or 4.
  void (*dots)(int64_t count, const void* rows, const void* panel, const int32_t* indices, int64_t n, int64_t origin,
               int64_t vectors, void* out, int64_t stride);
  void (*dots_long)(int64_t count, const void* rows, const void* panel, const int64_t* indices, int64_t n, int64_t origin,
                    int64_t vectors, void* out, int64_t stride);
};

SddmmKernels sddmm_kernels(DType dtype);
const char* instruction_set();

// How work is spread: `run(n, f)` calls f(begin, end) on ranges that cover [0, n), on up to `threads` threads.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t n, const std::function<void(int64_t begin, int64_t end)>& f)> run;
};

struct SddmmArgs {
  const void* grad_output;  // [T, out], contiguous
  const void* input;        // [T, in], contiguous
  const void* indices;      // [nnz], sorted; int32, or int64 if long_indices; null for all out * in entries
  void* result;             // [nnz], float, or double for f64
  int64_t tokens, out, in, nnz;
  bool long_indices;
  DType dtype;
};

void sddmm(const SddmmArgs& args, const Parallel& parallel);

}  // namespace sprand::cpu
