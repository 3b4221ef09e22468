// Tests of the emulator simt_host.h: right kernels give right results in every thread order, and mistakes are found.
//
// With the argument "out-of-bounds" it stores one element behind an array instead: the build with AddressSanitizer must stop
// there.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <vector>

#include "expect.h"
#include "kernels.cuh"

namespace {

using namespace emulator_tests;

constexpr int kOrders[] = {0, 1, 2, 3, 11};

void expect(bool condition, const std::string& what) {
  tests::expect(condition, what + " (thread order " + std::to_string(simt::order) + ")");
}

template <class F>
void expect_error(const std::string& part, F&& f) {
  std::string message = "no error";
  try {
    f();
  } catch (const std::exception& error) {
    message = error.what();
  }
  expect(message.find(part) != std::string::npos, "expected an error with \"" + part + "\", got: " + message);
}

template <class F>
bool right_in_all_orders(F&& f) {
  bool right = true;
  for (int order : kOrders) {
    simt::order = order;
    right = f() && right;
  }
  simt::order = 0;
  return right;
}

void test_right_kernels() {
  std::vector<float> values(4 * kThreads - 5);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i % 7) - 2;
  const int n = static_cast<int>(values.size());
  expect(right_in_all_orders([&] {
           std::vector<float> sums(4, -1);
           SPRAND_LAUNCH(block_sum, 4, kThreads, kThreads / 32 * sizeof(float), nullptr, values.data(), sums.data(), n);
           return std::accumulate(sums.begin(), sums.end(), 0.f) == std::accumulate(values.begin(), values.end(), 0.f);
         }),
         "block_sum");
  expect(right_in_all_orders([&] {
           std::vector<float> spike(2 * kThreads, 1.f);
           spike[kThreads + 40] = 2.f;
           std::vector<int> answers(spike.size(), -1), expected(spike.size(), 0);
           std::fill(expected.begin() + kThreads, expected.end(), 1);
           SPRAND_LAUNCH(any_above, 2, kThreads, 0, nullptr, spike.data(), 1.5f, answers.data());
           return answers == expected;
         }),
         "any_above");
  expect(right_in_all_orders([&] {
           std::vector<int> lanes(32);
           std::iota(lanes.begin(), lanes.end(), 0);
           SPRAND_LAUNCH(rotate_halves, 1, 32, 0, nullptr, lanes.data());
           bool right = true;
           for (int i = 0; i < 32; ++i) right = right && lanes[i] == (i < 16 ? (i + 1) % 16 : 16 + (i + 3) % 16);
           return right;
         }),
         "rotate_halves");
}

template <class F>
bool reverses(int rounds, F&& launch) {
  std::vector<int> in(rounds * kThreads), out(in.size(), -1);
  std::iota(in.begin(), in.end(), 0);
  return right_in_all_orders([&] {
    launch(in.data(), out.data());
    bool right = true;
    for (int i = 0; i < rounds * kThreads; ++i) right = right && out[i] == i / kThreads * kThreads + kThreads - 1 - i % kThreads;
    return right;
  });
}

void test_missing_barriers() {
  expect(reverses(1, [](int* in, int* out) { SPRAND_LAUNCH((reverse<true>), 1, kThreads, 0, nullptr, in, out); }), "reverse");
  expect(!reverses(1, [](int* in, int* out) { SPRAND_LAUNCH((reverse<false>), 1, kThreads, 0, nullptr, in, out); }),
         "reverse without its barrier must show");
  expect(reverses(2, [](int* in, int* out) { SPRAND_LAUNCH((reverse_twice<true>), 1, kThreads, 0, nullptr, in, out); }),
         "reverse_twice");
  expect(!reverses(2, [](int* in, int* out) { SPRAND_LAUNCH((reverse_twice<false>), 1, kThreads, 0, nullptr, in, out); }),
         "reverse_twice without its second barrier must show");
}

void test_errors() {
  expect_error("deadlock", [] { SPRAND_LAUNCH(divergent_barrier, 1, 64, 0, nullptr, ); });
  expect_error("leaves it out", [] { SPRAND_LAUNCH(left_out_of_mask, 1, 32, 0, nullptr, ); });
  expect_error("no error", [] { SPRAND_LAUNCH(store_behind_shared, 1, 32, 16, nullptr, 3); });
  expect_error("behind the dynamic shared memory", [] { SPRAND_LAUNCH(store_behind_shared, 1, 32, 16, nullptr, 4); });
  int value = 0;
  expect_error("refuses", [&] { SPRAND_LAUNCH(store, 1, 2048, 0, nullptr, &value, 1); });
  expect_error("refuses", [&] { SPRAND_LAUNCH(store, 0, 32, 0, nullptr, &value, 1); });
  expect_error("refuses", [&] { SPRAND_LAUNCH(store, 1, 32, 228 * 1024, nullptr, &value, 1); });
  expect_error("no error", [&] { SPRAND_LAUNCH(store, 1, 32, 0, nullptr, &value, 1); });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && std::strcmp(argv[1], "out-of-bounds") == 0) {
    std::vector<int> out(40);
    SPRAND_LAUNCH(store, 2, 32, 0, nullptr, out.data(), 41);
    return 0;
  }
  test_right_kernels();
  test_missing_barriers();
  test_errors();
  return tests::finish();
}
