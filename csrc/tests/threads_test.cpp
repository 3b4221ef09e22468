// The CPU kernels on threads of its own, under ASan, UBSan or TSan: every dtype, sizes at the edges, one to five threads, and
// the same bits for each number of threads. torch's pool of threads is not built for TSan, which then reports races of its own.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/embedding_grad.h"
#include "../cpu/entries.h"
#include "../cpu/sddmm.h"
#include "expect.h"

namespace {

using namespace sprand::cpu;
using tests::expect;
using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using Body = std::function<void(int64_t, int64_t)>;

// Ranges of [0, n) on threads, each taken by whoever is free.
void on_threads(int64_t threads, int64_t n, int64_t grain, const Body& body) {
  std::atomic<int64_t> next{0};
  auto take = [&] {
    for (int64_t begin; (begin = next.fetch_add(grain)) < n;) body(begin, std::min(n, begin + grain));
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back(take);
  take();
  for (std::thread& other : others) other.join();
}

std::mt19937 source(7);

template <class T>
std::vector<T> numbers(int64_t n) {
  std::uniform_real_distribution<float> draw(-1, 1);
  std::vector<T> values(n);
  for (T& value : values) value = static_cast<T>(draw(source));
  return values;
}

// n sorted positions of [0, size), the first and the last among them where there is room.
template <class Index>
std::vector<Index> positions(int64_t n, int64_t size) {
  std::vector<Index> all(size);
  std::iota(all.begin(), all.end(), Index{0});
  if (n < size && size > 2) std::shuffle(all.begin() + 1, all.end() - 1, source);
  if (n > 1 && n < size) std::swap(all[1], all[size - 1]);
  all.resize(n);
  std::sort(all.begin(), all.end());
  return all;
}

template <class T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

template <class T, class Index>
void test_sddmm(DType dtype, int64_t tokens, int64_t out, int64_t in, int64_t nnz, const std::string& name, bool all = false) {
  const auto g = numbers<T>(tokens * out), x = numbers<T>(tokens * in);
  const auto indices = positions<Index>(nnz, out * in);
  std::vector<Sum<T>> first;
  for (int64_t threads : {1, 2, 5}) {
    std::vector<Sum<T>> result(nnz, Sum<T>(NAN));
    const Parallel parallel{threads, [&](int64_t n, const Body& body) { on_threads(threads, n, 1, body); }};
    const void* at = all ? nullptr : indices.data();
    sddmm({g.data(), x.data(), at, result.data(), tokens, out, in, nnz, sizeof(Index) == 8, dtype}, parallel);
    if (threads == 1) first = result;
    expect(same(result, first), name + ": other bits on " + std::to_string(threads) + " threads");
  }
  double worst = 0;
  for (int64_t p = 0; p < nnz; ++p) {
    double sum = 0;
    for (int64_t t = 0; t < tokens; ++t)
      sum += static_cast<double>(static_cast<Sum<T>>(g[t * out + indices[p] / in])) *
             static_cast<double>(static_cast<Sum<T>>(x[t * in + indices[p] % in]));
    worst = std::max(worst, std::abs(sum - static_cast<double>(first[p])));
  }
  expect(worst <= 1e-5 * std::max<int64_t>(tokens, 1), name + ": differs from a plain sum by " + std::to_string(worst));
}

template <class T, class Index>
void test_entries(int64_t size, int64_t nnz, const std::string& name) {
  const auto indices = positions<Index>(nnz, size);
  const auto before = numbers<T>(size), base = numbers<T>(nnz);
  const auto delta = numbers<Sum<T>>(nnz), grad = numbers<Sum<T>>(nnz);
  std::vector<T> first;
  std::vector<Sum<T>> first_delta;
  for (int64_t threads : {1, 2, 5}) {
    auto weight = before;
    std::vector<T> read(nnz), kept(nnz);
    auto d = delta, avg = std::vector<Sum<T>>(nnz), square = avg;
    const auto step = sprand::adamw_step<Sum<T>>(0.1, 0.9, 0.999, 1e-8, 0.1, 1, 1);
    on_threads(threads, nnz, 7, [&](int64_t begin, int64_t end) {
      const Index* at = indices.data() + begin;
      const auto position = [at](int64_t p) { return at[p]; };
      const int64_t n = end - begin;
      gather(weight.data(), at, kept.data() + begin, n);
      patch(weight.data(), position, base.data() + begin, static_cast<const Sum<T>*>(nullptr), Sum<T>(1), n);
      adamw(step, d.data() + begin, grad.data() + begin, avg.data() + begin, square.data() + begin, n);
      patch(weight.data(), position, base.data() + begin, d.data() + begin, Sum<T>(1), n);
      scatter_add(weight.data(), at, delta.data() + begin, Sum<T>(0.5), n);
      gather(weight.data(), at, read.data() + begin, n);
    });
    if (threads == 1) first = read, first_delta = d;
    expect(same(read, first) && same(d, first_delta), name + ": other bits on " + std::to_string(threads) + " threads");
    on_threads(threads, nnz, 7, [&](int64_t begin, int64_t end) {
      const auto position = [at = indices.data() + begin](int64_t p) { return at[p]; };
      patch(weight.data(), position, kept.data() + begin, static_cast<const Sum<T>*>(nullptr), Sum<T>(1), end - begin);
    });
    expect(same(weight, before), name + ": the base did not come back");
  }
}

template <class T, class Index>
void test_embedding(int64_t tokens, int64_t rows, int64_t features, int64_t nnz, const std::string& name) {
  const auto g = numbers<T>(tokens * features);
  const auto indices = positions<Index>(nnz, rows * features);
  std::vector<int32_t> row(tokens), sorted(tokens);
  for (int32_t& r : row) r = source() % (rows + 2);  // some are outside of the vocabulary
  std::vector<int64_t> order(tokens);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return row[a] < row[b]; });
  for (int64_t i = 0; i < tokens; ++i) sorted[i] = row[order[i]];
  const auto pieces = embedding_pieces(sorted.data(), tokens, indices.data(), nnz, features, int64_t{1});
  std::vector<Sum<T>> first;
  for (int64_t threads : {1, 2, 5}) {
    std::vector<Sum<T>> result(nnz);
    on_threads(threads, pieces.size(), 1, [&](int64_t begin, int64_t end) {
      for (; begin < end; ++begin) sum_piece(pieces[begin], g.data(), order.data(), indices.data(), result.data(), features);
    });
    if (threads == 1) first = result;
    expect(same(result, first), name + ": other bits on " + std::to_string(threads) + " threads");
  }
}

template <class T, class Index>
void test_all(DType dtype, const std::string& name) {
  for (int64_t tokens : {0, 1, 63, 200})
    for (auto [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {3, 5}, {37, 70}, {300, 64}})
      for (int64_t nnz : {int64_t{0}, int64_t{1}, out * in / 3, out * in})
        test_sddmm<T, Index>(dtype, tokens, out, in, nnz,
                             "sddmm " + name + " T " + std::to_string(tokens) + ", " + std::to_string(out) + " x " +
                                 std::to_string(in) + ", nnz " + std::to_string(nnz));
  for (int64_t tokens : {0, 1, 200})
    for (auto [out, in] : {std::pair<int64_t, int64_t>{1, 1}, {37, 8}, {519, 3}, {6, 3100}})
      test_sddmm<T, Index>(
          dtype, tokens, out, in, out * in,
          "all entries, " + name + " T " + std::to_string(tokens) + ", " + std::to_string(out) + " x " + std::to_string(in),
          true);
  test_sddmm<T, Index>(dtype, 70, 2, 6200, 900, "sddmm " + name + ", groups of columns");
  for (int64_t size : {1, 9, 4000})
    for (int64_t nnz : {int64_t{0}, int64_t{1}, size / 2, size})
      test_entries<T, Index>(size, nnz, "entries " + name + " " + std::to_string(nnz) + " of " + std::to_string(size));
  for (int64_t tokens : {0, 1, 33, 500})
    for (int64_t nnz : {0, 1, 100, 11 * 40})
      test_embedding<T, Index>(tokens, 11, 40, nnz, "embedding " + name + " T " + std::to_string(tokens));
}

}  // namespace

int main() {
  test_all<float, int32_t>(DType::f32, "f32");
  test_all<float, int64_t>(DType::f32, "f32, int64");
  test_all<double, int32_t>(DType::f64, "f64");
  test_all<BFloat16, int32_t>(DType::bf16, "bf16");
  test_all<BFloat16, int64_t>(DType::bf16, "bf16, int64");
  test_all<Half, int32_t>(DType::f16, "f16");
  return tests::finish();
}
