// The CPU SDDMM driver: result[p] = sum over tokens of grad_output[t, row p] * input[t, column p].
//
// Token-major operands make a sample a walk with two large strides, so a block of tokens is packed first: input into a
// panel `[in][tokens]` and grad_output into a panel `[out][tokens]`. A sample is then a dot product of two contiguous
// runs of kPanelBytes. Rows are packed in chunks, and where the input panel outgrows the second-level cache, its columns
// are met in groups. Two or four rows with the same columns (a pattern in runs) share the loads of their columns.
//
// Tokens are cut into splits that depend on the shape alone. A thread packs and multiplies the blocks of a split by
// itself, without a barrier, into the split's own partial sums, which are added in order at the end: the result does not
// depend on the number of threads. Beside the operands this needs (in + kRowsAtOnce) * kPanelBytes for each thread, and at most
// kPartialBytes for the partial sums.
#include "sddmm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

namespace sprand::cpu {
namespace {

constexpr int64_t kColumnsAtOnce = 3072;  // columns of a group: 768 KiB of panel
constexpr int64_t kRowsAtOnce = 256;      // rows of a chunk: 64 KiB of panel
constexpr int64_t kMostSplits = 8;        // of the tokens
constexpr int64_t kPartialBytes = int64_t(4) << 20;
constexpr int64_t kSerialWork = int64_t(1) << 17;  // multiplications and packed elements not worth a second thread

// Memory kept between calls by the thread that uses it, grown when needed.
class Workspace {
 public:
  char* get(int64_t bytes) {
    if (bytes > size_) {
      size_ = 0;
      memory_.reset(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return static_cast<char*>(memory_.get());
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  int64_t size_ = 0;
};

int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

auto dots_of(const SddmmKernels& k, const int32_t*) { return k.dots; }
auto dots_of(const SddmmKernels& k, const int64_t*) { return k.dots_long; }

// The samples as runs of one row, or of `rows` rows with the same columns, within one group of columns, ordered by chunk of
// rows, group, row. Row r of a run has the samples [first + r * stride, first + r * stride + count).
struct Run {
  int64_t row, group, first, count, rows, stride;
  std::pair<int64_t, int64_t> panel() const { return {row / kRowsAtOnce, group}; }
  bool operator<(const Run& other) const { return panel() < other.panel(); }
};

// How many runs from `run` on, 4, 2 or 1, can be taken as one.
template <class Index>
int64_t equal_rows(const Index* indices, int64_t in, const Run* run, const Run* end) {
  auto equal = [&](int64_t r) {
    const Run& other = run[r];
    if (other.panel() != run->panel() || other.row != run->row + r || other.count != run->count) return false;
    if (other.first != run->first + r * (run[1].first - run->first)) return false;
    const Index *a = indices + run->first, *b = indices + other.first;
    for (int64_t p = 0; p < run->count; ++p)
      if (b[p] - a[p] != r * in) return false;
    return true;
  };
  if (end - run < 2 || !equal(1)) return 1;
  return end - run >= 4 && equal(2) && equal(3) ? 4 : 2;
}

// The runs of all entries, for which no index is read.
std::vector<Run> all_runs(const SddmmArgs& a) {
  std::vector<Run> runs;
  for (int64_t group = 0; group * kColumnsAtOnce < a.in; ++group) {
    const int64_t begin = group * kColumnsAtOnce, count = std::min(kColumnsAtOnce, a.in - begin);
    for (int64_t row = 0; row < a.out;) {
      const int64_t left = std::min(a.out, (row / kRowsAtOnce + 1) * kRowsAtOnce) - row, rows = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      runs.push_back({row, group, row * a.in + begin, count, rows, a.in});
      row += rows;
    }
  }
  std::stable_sort(runs.begin(), runs.end());
  return runs;
}

template <class Index>
std::vector<Run> runs_of(const SddmmArgs& a) {
  const Index* indices = static_cast<const Index*>(a.indices);
  std::vector<Run> runs;
  for (int64_t p = 0; p < a.nnz;) {
    const int64_t row = indices[p] / a.in, group = (indices[p] - row * a.in) / kColumnsAtOnce;
    const int64_t limit = row * a.in + std::min(a.in, (group + 1) * kColumnsAtOnce), first = p;
    while (p < a.nnz && indices[p] < limit) ++p;
    runs.push_back({row, group, first, p - first, 1, 0});
  }
  if (a.in > kColumnsAtOnce) std::stable_sort(runs.begin(), runs.end());
  size_t merged = 0;
  for (size_t i = 0; i < runs.size();) {
    const int64_t rows = equal_rows(indices, a.in, runs.data() + i, runs.data() + runs.size());
    Run run = runs[i];
    run.rows = rows;
    run.stride = rows > 1 ? runs[i + 1].first - run.first : 0;
    runs[merged++] = run;
    i += rows;
  }
  runs.resize(merged);
  return runs;
}

// Tokens [token, stop) of the runs [begin, end), added to `result`; `columns_of_all` are 0, 1, ... where all entries are meant.
template <class Index>
void multiply(const SddmmArgs& a, const SddmmKernels& k, const Index* columns_of_all, const Run* begin, const Run* end,
              int64_t token, int64_t stop, char* result) {
  thread_local Workspace panels;
  const Index* indices = static_cast<const Index*>(a.indices);
  const int64_t size = element_size(a.dtype), sum_size = a.dtype == DType::f64 ? 8 : 4;
  char* columns = panels.get((a.in + kRowsAtOnce) * kPanelBytes);
  char* rows = columns + a.in * kPanelBytes;
  for (; token < stop; token += k.tokens) {
    const int64_t tokens = std::min(k.tokens, stop - token), vectors = (tokens + k.lanes - 1) / k.lanes;
    k.pack(static_cast<const char*>(a.input) + token * a.in * size, a.in, tokens, a.in, columns);
    int64_t low = 0, high = 0;  // the packed rows
    for (const Run* run = begin; run < end; ++run) {
      if (run->row < low || run->row >= high) {
        low = run->row / kRowsAtOnce * kRowsAtOnce;
        high = std::min(low + kRowsAtOnce, a.out);
        k.pack(static_cast<const char*>(a.grad_output) + (token * a.out + low) * size, a.out, tokens, high - low, rows);
      }
      const Index* at = indices ? indices + run->first : columns_of_all + run->group * kColumnsAtOnce;
      dots_of(k, at)(run->rows, rows + (run->row - low) * kPanelBytes, columns, at, run->count, indices ? run->row * a.in : 0,
                     vectors, result + run->first * sum_size, run->stride);
    }
  }
}

template <class Sum>
void add_partials(const Sum* partials, int64_t splits, int64_t nnz, Sum* result, int64_t begin, int64_t end) {
  for (int64_t p = begin; p < end; ++p) {
    Sum sum = partials[p];
    for (int64_t s = 1; s < splits; ++s) sum += partials[s * nnz + p];
    result[p] = sum;
  }
}

template <class Index>
void run(const SddmmArgs& a, const Parallel& parallel) {
  const SddmmKernels k = sddmm_kernels(a.dtype);
  const std::vector<Run> runs = a.indices ? runs_of<Index>(a) : all_runs(a);
  std::vector<Index> columns_of_all(a.indices ? 0 : a.in);
  std::iota(columns_of_all.begin(), columns_of_all.end(), Index{0});
  const int64_t sum_size = a.dtype == DType::f64 ? 8 : 4, blocks = (a.tokens + k.tokens - 1) / k.tokens;
  const int64_t splits = std::clamp(kPartialBytes / (a.nnz * sum_size), int64_t(1), std::min(kMostSplits, blocks));
  const bool serial = a.tokens * (a.nnz + a.in + a.out) < kSerialWork;
  const int64_t parts = serial ? 1 : (parallel.threads + splits - 1) / splits;  // of the runs, for more threads than splits
  thread_local Workspace memory;
  char* partials = splits == 1 ? static_cast<char*>(a.result) : memory.get(splits * a.nnz * sum_size);
  auto tasks = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t split = task / parts, part = task % parts, count = runs.size();
      char* result = partials + split * a.nnz * sum_size;
      const Run *first = runs.data() + part * count / parts, *last = runs.data() + (part + 1) * count / parts;
      for (const Run* run = first; run < last; ++run)
        for (int64_t r = 0; r < run->rows; ++r)
          std::memset(result + (run->first + r * run->stride) * sum_size, 0, run->count * sum_size);
      if (first < last)
        multiply<Index>(a, k, columns_of_all.data(), first, last, split * blocks / splits * k.tokens,
                        std::min(a.tokens, (split + 1) * blocks / splits * k.tokens), result);
    }
  };
  if (serial)
    tasks(0, splits);
  else
    parallel.run(splits * parts, tasks);
  if (splits == 1) return;
  if (a.dtype == DType::f64)
    add_partials(reinterpret_cast<double*>(partials), splits, a.nnz, static_cast<double*>(a.result), 0, a.nnz);
  else
    add_partials(reinterpret_cast<float*>(partials), splits, a.nnz, static_cast<float*>(a.result), 0, a.nnz);
}

}  // namespace

void sddmm(const SddmmArgs& args, const Parallel& parallel) {
  if (args.nnz == 0) return;
  if (args.tokens == 0) {
    std::memset(args.result, 0, args.nnz * (args.dtype == DType::f64 ? 8 : 4));
  } else if (args.long_indices) {
    run<int64_t>(args, parallel);
  } else {
    run<int32_t>(args, parallel);
  }
}

}  // namespace sprand::cpu
