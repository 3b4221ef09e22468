// Tensor cores behind functions: ldmatrix and mma.sync.m16n8k16 as PTX under nvcc, and the same lane by lane on the host.
//
// Fragments as PTX defines them, for lane l with g = l / 4 and t = l % 4, two 16-bit values in a register, the lower one first:
// A [16, 16]: a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t + 8), each with the next column;
// B [16, 8]: b[0] = (2t, g), b[1] = (2t + 8, g), each with the next row; C and D [16, 8]: (g, 2t), (g, 2t + 1) and 8 rows below.
// All lanes of the warp take part. The host adds the 16 products of an output one by one in float32, which is no better than what
// the device promises. It reports a row of ldmatrix that is not aligned or lies outside the dynamic shared memory.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "simt_host.h"

namespace mma {

// How ldmatrix names a place in shared memory: the device's shared address, on the host the offset in the dynamic part.
__device__ __forceinline__ uint32_t shared_address(const void* place) {
#if defined(__CUDACC__)
  return static_cast<uint32_t>(__cvta_generic_to_shared(place));
#else
  return static_cast<uint32_t>(static_cast<const unsigned char*>(place) - simt::dynamic_shared());
#endif
}

#if !defined(__CUDACC__)

constexpr uint32_t kAllLanes = 0xFFFFFFFFu;

// The two 16-bit values of a register as float.
template <class T>
void unpack(uint32_t pair, float& low, float& high) {
  const uint16_t half[2] = {static_cast<uint16_t>(pair), static_cast<uint16_t>(pair >> 16)};
  T value[2];
  std::memcpy(value, half, sizeof(value));
  low = static_cast<float>(value[0]);
  high = static_cast<float>(value[1]);
}

// Every lane shows `mine`; `look(show)` may read what lane s showed as show(s). Nobody goes on before all have looked.
template <class V, class F>
void exchange_all(const V& mine, F&& look) {
  static_assert(sizeof(V) <= sizeof(simt::Warp::slot[0]));
  simt::Warp& warp = simt::warp();
  std::memcpy(warp.slot[simt::lane()], &mine, sizeof(V));
  simt::warp_barrier(kAllLanes);
  look([&](int source) {
    V value;
    std::memcpy(&value, warp.slot[source], sizeof(V));
    return value;
  });
  simt::warp_barrier(kAllLanes);
}

template <int kMatrices, bool kTransposed>
void host_ldmatrix(uint32_t* matrices, uint32_t row) {
  const int lane = simt::lane();
  if (lane < 8 * kMatrices && (row % 16 != 0 || size_t{row} + 16 > simt::running->shared_bytes)) {
    simt::fail("simt: ldmatrix row at " + std::to_string(row) + ", not aligned or outside the dynamic shared memory");
  }
  exchange_all(row, [&](auto show) {
    for (int m = 0; m < kMatrices; ++m) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int r = kTransposed ? 2 * (lane % 4) + i : lane / 4, column = kTransposed ? lane / 4 : 2 * (lane % 4) + i;
        std::memcpy(&pair[i], simt::dynamic_shared() + show(8 * m + r) + 2 * column, 2);
      }
      matrices[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
    }
  });
}

template <class T>
void host_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct A {
    uint32_t a[4];
  };
  struct B {
    uint32_t b[2];
  };
  const int g = simt::lane() / 4, t = simt::lane() % 4;
  float left[2][16], right[16][2];  // this lane's rows g and g + 8 of A, its columns 2t and 2t + 1 of B
  exchange_all(A{{a[0], a[1], a[2], a[3]}}, [&](auto show) {
    for (int s = 0; s < 4; ++s) {
      const A of = show(4 * g + s);
      for (int r = 0; r < 4; ++r) unpack<T>(of.a[r], left[r % 2][2 * s + r / 2 * 8], left[r % 2][2 * s + r / 2 * 8 + 1]);
    }
  });
  exchange_all(B{{b[0], b[1]}}, [&](auto show) {
    for (int column = 0; column < 2; ++column) {
      for (int s = 0; s < 4; ++s) {
        const B of = show(4 * (2 * t + column) + s);
        for (int r = 0; r < 2; ++r) unpack<T>(of.b[r], right[2 * s + r * 8][column], right[2 * s + r * 8 + 1][column]);
      }
    }
  });
  for (int r = 0; r < 4; ++r) {
    for (int k = 0; k < 16; ++k) d[r] += left[r / 2][k] * right[k][r % 2];
  }
}

#endif

// Four 8x8 matrices of 16-bit values: lane 8m + r names row r of matrix m (16 bytes). matrices[m] of lane l is the pair
// (row l / 4, columns 2 (l % 4) and the next).
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&matrices)[4], uint32_t row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
#else
  host_ldmatrix<4, false>(matrices, row);
#endif
}

// The same of the transposed matrices: (row l / 4, columns 2 (l % 4) and the next) of each transpose.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&matrices)[4], uint32_t row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(row)
               : "memory");
#else
  host_ldmatrix<4, true>(matrices, row);
#endif
}

// Two transposed matrices, named by lanes 0 to 15.
__device__ __forceinline__ void ldmatrix_x2_trans(uint32_t (&matrices)[2], uint32_t row) {
#if defined(__CUDACC__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(matrices[0]), "=r"(matrices[1])
               : "r"(row)
               : "memory");
#else
  host_ldmatrix<2, true>(matrices, row);
#endif
}

// d += a b, with a [16, 16], b [16, 8] of T (__nv_bfloat16 or __half) and d [16, 8] of float.
template <class T>
__device__ __forceinline__ void m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(__CUDACC__)
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  host_m16n8k16<T>(d, a, b);
#endif
}

}  // namespace mma
