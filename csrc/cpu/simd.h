// Vectors of the widest kind that this translation unit may use, as GCC vector types: +, -, *, /, comparisons and ?:
// are the language's. Only what the language lacks (fused multiply-add, square root, 32 x 32 -> 64 bit products,
// interleaving, widening) is written per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff {
namespace FASTDIFF_VARIANT {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define FASTDIFF_AVX512 1
constexpr int kBytes = 64;
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define FASTDIFF_AVX2 1
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float Floats __attribute__((vector_size(kBytes)));
typedef double Doubles __attribute__((vector_size(kBytes)));
typedef int32_t Ints __attribute__((vector_size(kBytes)));
typedef int64_t LongInts __attribute__((vector_size(kBytes)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint64_t Longs __attribute__((vector_size(kBytes)));

template <class C>
struct Simd;
template <>
struct Simd<float> {
  typedef Floats Vector;
  typedef Ints Bits;
};
template <>
struct Simd<double> {
  typedef Doubles Vector;
  typedef LongInts Bits;
};
template <class C>
using Vector = typename Simd<C>::Vector;
template <class C>
constexpr int kWidth = kBytes / int(sizeof(C));

#define FASTDIFF_INLINE inline __attribute__((always_inline))
#define FASTDIFF_APART __attribute__((noinline))  // big, and seldom or for many elements at a time

template <class C>
FASTDIFF_INLINE Vector<C> load(const C* from) {
  Vector<C> value;
  memcpy(&value, from, kBytes);
  return value;
}

template <class V, class C>
FASTDIFF_INLINE void store(C* to, V value) {
  memcpy(to, &value, kBytes);
}

FASTDIFF_INLINE Floats fill(float value) { return value - Floats{}; }  // - keeps the sign of a zero, + would not
FASTDIFF_INLINE Doubles fill(double value) { return value - Doubles{}; }

FASTDIFF_INLINE Floats absolute(Floats x) { return (Floats)((Words)x & 0x7FFFFFFFu); }
FASTDIFF_INLINE Doubles absolute(Doubles x) { return (Doubles)((Longs)x & 0x7FFFFFFFFFFFFFFFull); }
FASTDIFF_INLINE Floats copy_sign(Floats size, Floats sign) {
  return (Floats)((Words)size | ((Words)sign & 0x80000000u));
}

#if defined(FASTDIFF_AVX512)

FASTDIFF_INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FASTDIFF_INLINE Doubles fused(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c); }
FASTDIFF_INLINE Floats root(Floats x) { return (Floats)_mm512_sqrt_ps((__m512)x); }
FASTDIFF_INLINE Doubles root(Doubles x) { return (Doubles)_mm512_sqrt_pd((__m512d)x); }
// The product of the low halves of 64-bit lanes; what is in the high halves does not matter.
FASTDIFF_INLINE Longs product(Longs a, Longs b) { return (Longs)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
FASTDIFF_INLINE Floats from_unsigned(Words x) { return (Floats)_mm512_cvtepu32_ps((__m512i)x); }
// Interleaves within each 128-bit part: a0 b0 a1 b1, and a2 b2 a3 b3.
FASTDIFF_INLINE Floats zip_low(Floats a, Floats b) { return (Floats)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
FASTDIFF_INLINE Floats zip_high(Floats a, Floats b) { return (Floats)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
// The low halves of the 64-bit lanes of `low`, and those of `high` above them.
FASTDIFF_INLINE Words low_halves(Longs low, Longs high) {
  return (Words)_mm512_mask_moveldup_ps((__m512)low, 0xAAAA, (__m512)high);
}
// a > b ? a : b
FASTDIFF_INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm512_max_ps((__m512)a, (__m512)b); }
FASTDIFF_INLINE void widen(Floats x, Doubles& low, Doubles& high) {
  low = (Doubles)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  high = (Doubles)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
}

#elif defined(FASTDIFF_AVX2)

FASTDIFF_INLINE Floats fused(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FASTDIFF_INLINE Doubles fused(Doubles a, Doubles b, Doubles c) { return (Doubles)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c); }
FASTDIFF_INLINE Floats root(Floats x) { return (Floats)_mm256_sqrt_ps((__m256)x); }
FASTDIFF_INLINE Doubles root(Doubles x) { return (Doubles)_mm256_sqrt_pd((__m256d)x); }
FASTDIFF_INLINE Longs product(Longs a, Longs b) { return (Longs)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
FASTDIFF_INLINE Floats zip_low(Floats a, Floats b) { return (Floats)_mm256_unpacklo_ps((__m256)a, (__m256)b); }
FASTDIFF_INLINE Floats zip_high(Floats a, Floats b) { return (Floats)_mm256_unpackhi_ps((__m256)a, (__m256)b); }
FASTDIFF_INLINE Words low_halves(Longs low, Longs high) {
  return (Words)_mm256_blend_ps((__m256)low, _mm256_moveldup_ps((__m256)high), 0xAA);
}
FASTDIFF_INLINE Floats larger(Floats a, Floats b) { return (Floats)_mm256_max_ps((__m256)a, (__m256)b); }
FASTDIFF_INLINE void widen(Floats x, Doubles& low, Doubles& high) {
  low = (Doubles)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  high = (Doubles)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
}

#else

// Without fused multiply-add in hardware (x86-64 from before 2013) this is the C library's: slow, and right.
FASTDIFF_INLINE Floats fused(Floats a, Floats b, Floats c) {
  Floats r;
  for (int k = 0; k < kWidth<float>; ++k) r[k] = __builtin_fmaf(a[k], b[k], c[k]);
  return r;
}
FASTDIFF_INLINE Doubles fused(Doubles a, Doubles b, Doubles c) {
  Doubles r;
  for (int k = 0; k < kWidth<double>; ++k) r[k] = __builtin_fma(a[k], b[k], c[k]);
  return r;
}
FASTDIFF_INLINE Floats root(Floats x) {
  for (int k = 0; k < kWidth<float>; ++k) x[k] = __builtin_sqrtf(x[k]);
  return x;
}
FASTDIFF_INLINE Doubles root(Doubles x) {
  for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_sqrt(x[k]);
  return x;
}
#if defined(__SSE2__)
FASTDIFF_INLINE Longs product(Longs a, Longs b) { return (Longs)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
FASTDIFF_INLINE Longs product(Longs a, Longs b) { return (a & 0xFFFFFFFFull) * (b & 0xFFFFFFFFull); }
#endif
FASTDIFF_INLINE Floats zip_low(Floats a, Floats b) { return Floats{a[0], b[0], a[1], b[1]}; }
FASTDIFF_INLINE Floats zip_high(Floats a, Floats b) { return Floats{a[2], b[2], a[3], b[3]}; }
FASTDIFF_INLINE Words low_halves(Longs low, Longs high) { return (Words)((low & 0xFFFFFFFFull) | (high << 32)); }
FASTDIFF_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
FASTDIFF_INLINE void widen(Floats x, Doubles& low, Doubles& high) {
  low = Doubles{double(x[0]), double(x[1])};
  high = Doubles{double(x[2]), double(x[3])};
}

#endif

#if !defined(FASTDIFF_AVX512)
// Both halves convert exactly, so that the sum is the only rounding.
FASTDIFF_INLINE Floats from_unsigned(Words x) {
  return __builtin_convertvector((Ints)(x >> 16), Floats) * 65536.0f + __builtin_convertvector((Ints)(x & 0xFFFFu), Floats);
}
#endif

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
