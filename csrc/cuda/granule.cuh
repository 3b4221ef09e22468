// Granules of sddmm's row kernel: how 16 bytes hold the tokens of one column, and how pairs of neighbouring elements become them.
#pragma once
#include <type_traits>

#include "kernel.cuh"

namespace sprand::cuda {

template <class E>
struct Granule {  // 16-bit elements
  static constexpr int kTokens = 8;
  using Pair = uint32_t;
  using One = uint16_t;
  static __device__ __forceinline__ uint4 first(const Pair* s) {
    return {__byte_perm(s[0], s[1], 0x5410), __byte_perm(s[2], s[3], 0x5410), __byte_perm(s[4], s[5], 0x5410),
            __byte_perm(s[6], s[7], 0x5410)};
  }
  static __device__ __forceinline__ uint4 second(const Pair* s) {
    return {__byte_perm(s[0], s[1], 0x7632), __byte_perm(s[2], s[3], 0x7632), __byte_perm(s[4], s[5], 0x7632),
            __byte_perm(s[6], s[7], 0x7632)};
  }
  static __device__ __forceinline__ float low(uint32_t w) {
    if constexpr (std::is_same_v<E, __nv_bfloat16>)
      return __uint_as_float(w << 16);
    else
      return __half2float(__ushort_as_half(static_cast<uint16_t>(w)));
  }
  static __device__ __forceinline__ float high(uint32_t w) {
    if constexpr (std::is_same_v<E, __nv_bfloat16>)
      return __uint_as_float(w & 0xFFFF0000u);
    else
      return __half2float(__ushort_as_half(static_cast<uint16_t>(w >> 16)));
  }
  static __device__ __forceinline__ float value(One x) { return low(x); }
  static __device__ __forceinline__ float value(Pair x, bool odd) { return odd ? high(x) : low(x); }
  static __device__ __forceinline__ void unpack(uint4 v, float* x) {
    x[0] = low(v.x), x[1] = high(v.x), x[2] = low(v.y), x[3] = high(v.y);
    x[4] = low(v.z), x[5] = high(v.z), x[6] = low(v.w), x[7] = high(v.w);
  }
};

template <>
struct Granule<float> {
  static constexpr int kTokens = 4;
  using Pair = uint2;
  using One = uint32_t;
  static __device__ __forceinline__ uint4 first(const Pair* s) { return {s[0].x, s[1].x, s[2].x, s[3].x}; }
  static __device__ __forceinline__ uint4 second(const Pair* s) { return {s[0].y, s[1].y, s[2].y, s[3].y}; }
  static __device__ __forceinline__ float value(One x) { return __uint_as_float(x); }
  static __device__ __forceinline__ float value(Pair x, bool odd) { return __uint_as_float(odd ? x.y : x.x); }
  static __device__ __forceinline__ void unpack(uint4 v, float* x) {
    x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y), x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
  }
};

}  // namespace sprand::cuda
