// exp, tanh and others, elementwise on vectors: the same bits for every instruction set, for they are
// made of single IEEE operations (the C library's functions, for float64, are called lane by lane).
#pragma once

#include "simd.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// Coefficients of exp and tanh: Moshier's Cephes library, single precision.
constexpr float kExp[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                          4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
constexpr float kTanh[] = {-5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                           -3.33332819422e-1f};
// cosh x - 1 = x^2 (1/2 + x^2 / 24 + ...), for |x| < 1.
constexpr float kCosh[] = {2.755731922e-7f, 2.480158730e-5f, 1.388888889e-3f, 4.166666667e-2f, 0.5f};
// artanh w = w (1 + w^2 / 3 + w^4 / 5 + ...), for w < 0.22.
constexpr float kArtanh[] = {1.0f / 11, 1.0f / 9, 1.0f / 7, 1.0f / 5, 1.0f / 3, 1.0f};
constexpr float kLn2 = 0.693147180559945309f;

FASTDIFF_INLINE Floats exponential(Floats x) {
  x = x < -104.0f ? fill(-104.0f) : (x > 89.0f ? fill(89.0f) : x);  // beyond which it is 0 and inf; NaN stays
  const Floats magic = fill(12582912.0f);                            // 1.5 * 2^23: adding it rounds to an integer
  const Floats n = fused(x, fill(1.44269504088896341f), magic) - magic;
  Floats r = fused(n, fill(-0.693359375f), x);
  r = fused(n, fill(2.12194440e-4f), r);
  const Floats y = fused(polynomial(r, kExp), r * r, r) + 1.0f;
  // By 2^n in two steps, since 2^n itself may be out of range where the result is not. A NaN's n is any integer.
  const Ints whole = __builtin_convertvector(n == n ? n : fill(0.0f), Ints);
  const Ints half = whole >> 1;
  return y * (Floats)((half + 127) << 23) * (Floats)((whole - half + 127) << 23);
}

FASTDIFF_INLINE Floats hyperbolic_tangent(Floats x) {
  const Floats size = absolute(x), square = x * x;
  const Floats small = fused(x * square, polynomial(square, kTanh), x);
  const Floats large = copy_sign(1.0f - 2.0f / (exponential(2.0f * size) + 1.0f), x);
  return size < 0.625f ? small : large;
}

// ln cosh x: ln(1 + (cosh x - 1)) where |x| is small; |x| + ln(1 + exp(-2 |x|)) - ln 2 cancels there.
FASTDIFF_INLINE Floats log_cosh(Floats x) {
  const Floats size = absolute(x), square = x * x;
  const Floats over = size < 1.0f ? square * polynomial(square, kCosh) : exponential(-2.0f * size);
  const Floats w = over / (2.0f + over);
  const Floats log = 2.0f * w * polynomial(w * w, kArtanh);  // ln(1 + over)
  return size < 1.0f ? log : (size + log) - kLn2;
}

FASTDIFF_INLINE Doubles exponential(Doubles x) {
  for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_exp(x[k]);
  return x;
}

FASTDIFF_INLINE Doubles hyperbolic_tangent(Doubles x) {
  for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_tanh(x[k]);
  return x;
}

FASTDIFF_INLINE Doubles log_cosh(Doubles x) {
  for (int k = 0; k < kWidth<double>; ++k) {
    const double size = __builtin_fabs(x[k]), s = __builtin_sinh(0.5 * (size < 1 ? size : 1.0));
    x[k] = size < 1 ? __builtin_log1p(2 * s * s) : size + __builtin_log1p(__builtin_exp(-2 * size)) - 0.693147180559945309;
  }
  return x;
}

// sqrt(e^2 + c^2) without overflow.
template <class V>
FASTDIFF_INLINE V hypotenuse(V size, V c) {
  const V large = size > c ? size : c, small = size > c ? c : size;
  const V ratio = small / large;
  return large * root(fused(ratio, ratio, V{} + 1));
}

template <class V>
FASTDIFF_INLINE V sign(V e) {
  const V one = V{} + 1, zero = V{};
  return e != e ? e : (e > 0 ? one : (e < 0 ? -one : zero));  // of NaN it is NaN
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
