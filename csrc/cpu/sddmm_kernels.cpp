// The SDDMM kernels for AVX-512 with bf16 dot products, AVX-512, AVX2 and any CPU, and the choice between them at run time.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

#include "sddmm.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SPRAND_X86 1
#pragma GCC diagnostic push  // GCC 12 takes the undefined lanes of its own intrinsics for a mistake of ours
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

namespace sprand::cpu {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class To>
struct Convert {
  template <class From>
  static To from(From x) {
    return static_cast<To>(x);
  }
};
template <>
struct Convert<uint16_t> {
  static uint16_t from(BFloat16 x) { return x.x; }
};

// Lanes of the compiler's own vector type, for any CPU; also the float64 panels of every instruction set.
template <class F>
struct Plain {
  using Element = F;
  using Sum = F;
  static constexpr int64_t kLanes = 32 / sizeof(F), kTileTokens = 8, kTileCols = 8, kTileRows = 1;
  typedef F Lanes __attribute__((vector_size(32), aligned(sizeof(F)), may_alias));
  Lanes v;
  static const Lanes& load(const F* p) { return *reinterpret_cast<const Lanes*>(p); }
  void fma(const Lanes& r, const Lanes& c) { v += r * c; }
  F sum() const {
    F s = 0;
    for (int i = 0; i < kLanes; ++i) s += v[i];
    return s;
  }
  static void add4(const Plain& a, const Plain& b, const Plain& c, const Plain& d, F* out) {
    out[0] += a.sum();
    out[1] += b.sum();
    out[2] += c.sum();
    out[3] += d.sum();
  }
  template <class Source>
  static void transpose(const Source* src, int64_t stride, F* dst, int64_t column) {
    for (int64_t c = 0; c < kTileCols; ++c)
      for (int64_t t = 0; t < kTileTokens; ++t) dst[c * column + t] = Convert<F>::from(src[t * stride + c]);
  }
};

namespace portable {
#include "sddmm_kernels.inl"
}  // namespace portable

#if defined(SPRAND_X86)

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace avx2 {
#include "sddmm_kernels.inl"

__m128 load4(const float* p) { return _mm_loadu_ps(p); }
__m128 load4(const BFloat16* p) {
  return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p)), 16));
}
__m128 load4(const Half* p) { return _mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)); }

struct V {
  using Element = float;
  using Sum = float;
  static constexpr int64_t kLanes = 8, kTileTokens = 8, kTileCols = 4, kTileRows = 2;
  __m256 v;
  static __m256 load(const float* p) { return _mm256_load_ps(p); }
  void fma(__m256 r, __m256 c) { v = _mm256_fmadd_ps(r, c, v); }
  static void add4(const V& a, const V& b, const V& c, const V& d, float* out) {
    const __m256 h = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1))));
  }
  // Each 128-bit lane holds four tokens of four columns; an in-lane 4x4 transpose gives four columns of eight tokens.
  template <class Source>
  static void transpose(const Source* src, int64_t stride, float* dst, int64_t column) {
    __m256 r[4];
    for (int i = 0; i < 4; ++i)
      r[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(load4(src + i * stride)), load4(src + (i + 4) * stride), 1);
    const __m256 lo0 = _mm256_unpacklo_ps(r[0], r[1]), lo1 = _mm256_unpacklo_ps(r[2], r[3]);
    const __m256 hi0 = _mm256_unpackhi_ps(r[0], r[1]), hi1 = _mm256_unpackhi_ps(r[2], r[3]);
    _mm256_store_ps(dst, _mm256_shuffle_ps(lo0, lo1, 0x44));
    _mm256_store_ps(dst + column, _mm256_shuffle_ps(lo0, lo1, 0xEE));
    _mm256_store_ps(dst + 2 * column, _mm256_shuffle_ps(hi0, hi1, 0x44));
    _mm256_store_ps(dst + 3 * column, _mm256_shuffle_ps(hi0, hi1, 0xEE));
  }
};

template <class Source>
SddmmKernels kernels() {
  return kernels_of<V, Source>();
}
SddmmKernels kernels_f64() { return kernels_of<Plain<double>, double>(); }
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "sddmm_kernels.inl"

__m512 load16(const float* p) { return _mm512_loadu_ps(p); }
__m512 load16(const BFloat16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
__m512 load16(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }

// Sixteen 32-bit words of sixteen rows, transposed: word i of every row becomes the 64 bytes at dst + i * column (bytes).
void transpose_words(const __m512i* x, void* dst_, int64_t column) {
  char* dst = static_cast<char*>(dst_);
  __m512i t[16], u[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    u[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int j = 0; j < 4; ++j) {
    const __m512i s0 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0x88), s1 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0x88);
    const __m512i s2 = _mm512_shuffle_i32x4(u[j], u[4 + j], 0xDD), s3 = _mm512_shuffle_i32x4(u[8 + j], u[12 + j], 0xDD);
    _mm512_store_si512(dst + j * column, _mm512_shuffle_i32x4(s0, s1, 0x88));
    _mm512_store_si512(dst + (8 + j) * column, _mm512_shuffle_i32x4(s0, s1, 0xDD));
    _mm512_store_si512(dst + (4 + j) * column, _mm512_shuffle_i32x4(s2, s3, 0x88));
    _mm512_store_si512(dst + (12 + j) * column, _mm512_shuffle_i32x4(s2, s3, 0xDD));
  }
}

__m256 halves(__m512 v) { return _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)); }

void add4(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
  const __m256 h = _mm256_hadd_ps(_mm256_hadd_ps(halves(a), halves(b)), _mm256_hadd_ps(halves(c), halves(d)));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1))));
}

// The halves of a, then those of b.
__m512 halves(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xEE)); }
__m512 pairs(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xDD)); }

// add4 of a to `out` and of b to `other`, in the same order of sums.
void add8(__m512 a0, __m512 a1, __m512 a2, __m512 a3, __m512 b0, __m512 b1, __m512 b2, __m512 b3, float* out, float* other) {
  const __m512 h = pairs(pairs(halves(a0, b0), halves(a1, b1)), pairs(halves(a2, b2), halves(a3, b3)));
  const __m256 a = _mm512_castps512_ps256(h), b = _mm512_extractf32x8_ps(h, 1);
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))));
  _mm_storeu_ps(other, _mm_add_ps(_mm_loadu_ps(other), _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1))));
}

struct V {
  using Element = float;
  using Sum = float;
  static constexpr int64_t kLanes = 16, kTileTokens = 16, kTileCols = 16, kTileRows = 4;
  __m512 v;
  static __m512 load(const float* p) { return _mm512_load_ps(p); }
  void fma(__m512 r, __m512 c) { v = _mm512_fmadd_ps(r, c, v); }
  static void add4(const V& a, const V& b, const V& c, const V& d, float* out) { avx512::add4(a.v, b.v, c.v, d.v, out); }
  static void add8(const V (&a)[4], const V (&b)[4], float* out, float* other) {
    avx512::add8(a[0].v, a[1].v, a[2].v, a[3].v, b[0].v, b[1].v, b[2].v, b[3].v, out, other);
  }
  template <class Source>
  static void transpose(const Source* src, int64_t stride, float* dst, int64_t column) {
    __m512i rows[16];
    for (int i = 0; i < 16; ++i) {
      rows[i] = _mm512_castps_si512(load16(src + i * stride));
      _mm_prefetch((const char*)(src + i * stride + 16), _MM_HINT_T0);
    }
    transpose_words(rows, dst, column * sizeof(float));
  }
};

template <class Source>
SddmmKernels kernels() {
  return kernels_of<V, Source>();
}
SddmmKernels kernels_f64() { return kernels_of<Plain<double>, double>(); }
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
namespace avx512_bf16 {
#include "sddmm_kernels.inl"

struct V {
  using Element = uint16_t;
  using Sum = float;
  static constexpr int64_t kLanes = 32, kTileTokens = 32, kTileCols = 32, kTileRows = 4;
  __m512 v;
  static __m512i load(const uint16_t* p) { return _mm512_load_si512(p); }
  void fma(__m512i r, __m512i c) { v = _mm512_dpbf16_ps(v, (__m512bh)r, (__m512bh)c); }
  static void add4(const V& a, const V& b, const V& c, const V& d, float* out) { avx512::add4(a.v, b.v, c.v, d.v, out); }
  static void add8(const V (&a)[4], const V (&b)[4], float* out, float* other) {
    avx512::add8(a[0].v, a[1].v, a[2].v, a[3].v, b[0].v, b[1].v, b[2].v, b[3].v, out, other);
  }
  // Two tokens of a column become one word, then the words are transposed in two 16x16 halves.
  static void transpose(const BFloat16* src, int64_t stride, uint16_t* dst, int64_t column) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4,
                                         35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    __m512i left[16], right[16];
    for (int i = 0; i < 16; ++i) {
      const __m512i even = _mm512_loadu_si512(src + 2 * i * stride), odd = _mm512_loadu_si512(src + (2 * i + 1) * stride);
      left[i] = _mm512_permutex2var_epi16(even, low, odd);
      right[i] = _mm512_permutex2var_epi16(even, high, odd);
      _mm_prefetch((const char*)(src + 2 * i * stride + 32), _MM_HINT_T0);
      _mm_prefetch((const char*)(src + (2 * i + 1) * stride + 32), _MM_HINT_T0);
    }
    avx512::transpose_words(left, dst, column * sizeof(uint16_t));
    avx512::transpose_words(right, dst + 16 * column, column * sizeof(uint16_t));
  }
};

SddmmKernels kernels() { return kernels_of<V, BFloat16>(); }
}  // namespace avx512_bf16
#pragma GCC pop_options

#endif  // SPRAND_X86

enum Level { kPortable, kAvx2, kAvx512, kAvx512Bf16 };
const char* const kLevelNames[] = {"portable", "avx2", "avx512", "avx512_bf16"};

// The best level of this CPU, or a lower one named by SPRAND_INSTRUCTION_SET.
Level find_level() {
  Level best = kPortable;
#if defined(SPRAND_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) best = kAvx2;
  if (best == kAvx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = kAvx512;
  if (best == kAvx512 && __builtin_cpu_supports("avx512bf16")) best = kAvx512Bf16;
#endif
  if (const char* wanted = std::getenv("SPRAND_INSTRUCTION_SET"))
    for (int level = kPortable; level < best; ++level)
      if (std::strcmp(wanted, kLevelNames[level]) == 0) return static_cast<Level>(level);
  return best;
}

Level level() {
  static const Level chosen = find_level();
  return chosen;
}

}  // namespace

const char* instruction_set() { return kLevelNames[level()]; }

SddmmKernels sddmm_kernels(DType dtype) {
#if defined(SPRAND_X86)
  if (dtype == DType::bf16 && level() == kAvx512Bf16) return avx512_bf16::kernels();
  if (level() >= kAvx512) {
    switch (dtype) {
      case DType::f32:
        return avx512::kernels<float>();
      case DType::f64:
        return avx512::kernels_f64();
      case DType::bf16:
        return avx512::kernels<BFloat16>();
      case DType::f16:
        return avx512::kernels<Half>();
    }
  }
  if (level() == kAvx2) {
    switch (dtype) {
      case DType::f32:
        return avx2::kernels<float>();
      case DType::f64:
        return avx2::kernels_f64();
      case DType::bf16:
        return avx2::kernels<BFloat16>();
      case DType::f16:
        return avx2::kernels<Half>();
    }
  }
#endif
  switch (dtype) {
    case DType::f64:
      return portable::kernels_of<Plain<double>, double>();
    case DType::bf16:
      return portable::kernels_of<Plain<float>, BFloat16>();
    case DType::f16:
      return portable::kernels_of<Plain<float>, Half>();
    default:
      return portable::kernels_of<Plain<float>, float>();
  }
}

}  // namespace sprand::cpu
