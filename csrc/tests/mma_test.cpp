// Tests of mma_host.h: ldmatrix and mma.sync as the PTX manual defines them, element by element, in every thread order.
#include <string>
#include <vector>

#include "../emulator/mma_host.h"
#include "expect.h"

namespace {

void expect(bool condition, const std::string& what) {
  tests::expect(condition, what + " (thread order " + std::to_string(simt::order) + ")");
}

constexpr int kSlots = 40;  // rows of 16 bytes in shared memory
constexpr int kPairs = 10;  // registers that a lane shows

// Row r of shared memory holds 8r .. 8r + 7. Rows are addressed in a scattered order: row 7i mod 40 for lane i.
__global__ void load_matrices(uint32_t* out) {
  SPRAND_DYN_SMEM(memory);
  const int lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kSlots * 8; i += blockDim.x) reinterpret_cast<uint16_t*>(memory)[i] = i;
  __syncthreads();
  uint32_t plain[4], turned[4], two[2];
  const uint32_t row = mma::shared_address(memory) + 7 * lane % kSlots * 16;
  mma::ldmatrix_x4(plain, row);
  mma::ldmatrix_x4_trans(turned, row);
  mma::ldmatrix_x2_trans(two, lane < 16 ? row : 0xFFFFFFFFu);
  uint32_t* mine = out + threadIdx.x * kPairs;
  for (int m = 0; m < 4; ++m) mine[m] = plain[m], mine[4 + m] = turned[m];
  for (int m = 0; m < 2; ++m) mine[8 + m] = two[m];
}

__global__ void load_from(uint32_t offset) {
  uint32_t matrices[4];
  mma::ldmatrix_x4(matrices, offset);
}

// c [16, 8] += a [16, 16] b [16, 8], row-major, fragments read by the layout of the manual.
template <class T>
__global__ void multiply(const T* a, const T* b, float* c) {
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const auto pair = [](T low, T high) {
    uint16_t bits[2];
    std::memcpy(&bits[0], &low, 2);
    std::memcpy(&bits[1], &high, 2);
    return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
  };
  uint32_t left[4], right[2];
  float sum[4];
  for (int r = 0; r < 4; ++r) {
    const T* at = a + (g + r % 2 * 8) * 16 + 2 * t + r / 2 * 8;
    left[r] = pair(at[0], at[1]);
  }
  for (int r = 0; r < 2; ++r) {
    const T* at = b + (2 * t + r * 8) * 8 + g;
    right[r] = pair(at[0], at[8]);
  }
  for (int r = 0; r < 4; ++r) sum[r] = c[(g + r / 2 * 8) * 8 + 2 * t + r % 2];
  mma::m16n8k16<T>(sum, left, right);
  for (int r = 0; r < 4; ++r) c[(g + r / 2 * 8) * 8 + 2 * t + r % 2] = sum[r];
}

void test_ldmatrix(int warps) {
  std::vector<uint32_t> out(32 * warps * kPairs, 0xCDCDCDCD);
  SPRAND_LAUNCH(load_matrices, 1, 32 * warps, kSlots * 16, nullptr, out.data());
  const auto element = [](int matrix, int row, int column) { return 7 * (8 * matrix + row) % kSlots * 8 + column; };
  bool right = true;
  for (int thread = 0; thread < 32 * warps; ++thread) {
    const int lane = thread % 32, row = lane / 4, column = lane % 4 * 2;
    for (int m = 0; m < 4; ++m) {
      const uint32_t plain = element(m, row, column) | element(m, row, column + 1) << 16;
      const uint32_t turned = element(m, column, row) | element(m, column + 1, row) << 16;
      const uint32_t* mine = &out[thread * kPairs];
      right = right && mine[m] == plain && mine[4 + m] == turned && (m > 1 || mine[8 + m] == turned);
    }
  }
  expect(right, "ldmatrix");
}

// Small whole numbers, so that every sum is exact.
template <class T>
void test_multiply() {
  std::vector<T> a(16 * 16), b(16 * 8);
  std::vector<float> c(16 * 8), expected(16 * 8);
  for (int i = 0; i < 256; ++i) a[i] = static_cast<T>(static_cast<float>(i * 5 % 23 - 11));
  for (int i = 0; i < 128; ++i) b[i] = static_cast<T>(static_cast<float>(i * 3 % 19 - 9));
  for (int i = 0; i < 128; ++i) {
    c[i] = static_cast<float>(i % 7);
    expected[i] = c[i];
    for (int k = 0; k < 16; ++k) expected[i] += static_cast<float>(a[i / 8 * 16 + k]) * static_cast<float>(b[k * 8 + i % 8]);
  }
  SPRAND_LAUNCH(multiply<T>, 1, 32, 0, nullptr, a.data(), b.data(), c.data());
  expect(c == expected, "m16n8k16");
}

void test_bad_rows() {
  for (const uint32_t offset : {8u, 512u, 520u}) {
    std::string message = "no error";
    try {
      SPRAND_LAUNCH(load_from, 1, 32, 512, nullptr, offset);
    } catch (const std::exception& error) {
      message = error.what();
    }
    expect(message.find("ldmatrix row at " + std::to_string(offset)) != std::string::npos, "a bad row, got: " + message);
  }
}

}  // namespace

int main() {
  for (int order : {0, 1, 2, 3, 11}) {
    simt::order = order;
    test_ldmatrix(1);
    test_ldmatrix(3);
    test_multiply<__nv_bfloat16>();
    test_multiply<__half>();
  }
  test_bad_rows();
  return tests::finish();
}
