// The loss: e = scale (prediction - (p x0 + q n)), the sum of mask rho(e; c) of each unit, and the gradient
// factor mask rho'(e) scale, in one pass.
#pragma once

#include "blocks.h"
#include "functions.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// Sixteen sums in float64: element k of a unit goes to sum k mod 16, whatever the width of a vector, and the sixteen
// are added up in one order. So a unit's sum has the same bits for every instruction set.
struct Sums {
  Doubles lanes[kLanes / kWidth<double>];

  FASTDIFF_INLINE void add(const Floats (&values)[kLanes / kWidth<float>]) {
#pragma GCC unroll 4
    for (int k = 0; k < kLanes / kWidth<float>; ++k) {
      Doubles low, high;
      widen(values[k], low, high);
      lanes[2 * k] += low;
      lanes[2 * k + 1] += high;
    }
  }
  FASTDIFF_INLINE void add(const Doubles (&values)[kLanes / kWidth<double>]) {
#pragma GCC unroll 8
    for (int k = 0; k < kLanes / kWidth<double>; ++k) lanes[k] += values[k];
  }
  FASTDIFF_INLINE double total() const {
    double sums[kLanes];
    memcpy(sums, lanes, sizeof(sums));
    for (int half = kLanes / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    return sums[0];
  }
};

// e = scale (prediction - (p x0 + q n))
template <class C, bool has_x0, bool has_n>
FASTDIFF_INLINE Vector<C> difference(const C* prediction, const C* x0, const C* n, C p, C q, C scale, int k) {
  Vector<C> target{};
  if constexpr (has_x0) target = p * load(x0 + k);
  if constexpr (has_x0 && has_n) target = target + q * load(n + k);
  if constexpr (!has_x0 && has_n) target = q * load(n + k);
  return scale * (load(prediction + k) - target);
}

template <class C>
struct ErrorBlock {
  const C *prediction, *x0, *n, *mask;
  C* gradient;
  C p, q, scale, c, factor;
  int count;
};

template <class C, Function function, bool has_x0, bool has_n, bool has_mask, bool value, bool gradient>
void error_block(const ErrorBlock<C>& b, Sums& total) {
  typedef Vector<C> V;
  constexpr int kVectors = kLanes / kWidth<C>;
  const C *prediction = b.prediction, *x0 = b.x0, *n = b.n, *mask = b.mask;
  const C p = b.p, q = b.q, scale = b.scale, factor = b.factor;
  const V c = fill(b.c);
  C* out = b.gradient;
  Sums sums = total;
  auto lanes = [&](int start, V(&rho)[kVectors]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) {
      const int k = start + j * kWidth<C>;
      const V e = difference<C, has_x0, has_n>(prediction, x0, n, p, q, scale, k);
      V strength = fill(factor);
      if constexpr (has_mask) strength = load(mask + k) * strength;
      if constexpr (gradient) store(out + k, strength * derivative<function>(e, c) * scale);
      if constexpr (value) {
        rho[j] = error<function>(e, c);
        if constexpr (has_mask) rho[j] = load(mask + k) * rho[j];
      }
    }
  };
  V rho[kVectors];
  const int whole = b.count & ~(kLanes - 1);
  for (int k = 0; k < whole; k += kLanes) {
    lanes(k, rho);
    if constexpr (value) sums.add(rho);
  }
  if (whole < b.count) {
    lanes(whole, rho);
    // What lies behind the end counts as 0, also where an infinite scale has made a NaN of it.
    C values[kLanes];
    memcpy(values, rho, sizeof(values));
    for (int k = b.count - whole; k < kLanes; ++k) values[k] = C(0);
    memcpy(rho, values, sizeof(values));
    if constexpr (value) sums.add(rho);
  }
  total = sums;
}

template <class C>
using ErrorKernel = void (*)(const ErrorBlock<C>&, Sums&);

template <class C, Function function, bool has_x0, bool has_n, bool has_mask>
ErrorKernel<C> error_kernel(bool value, bool gradient) {
  if (value && gradient) return error_block<C, function, has_x0, has_n, has_mask, true, true>;
  if (value) return error_block<C, function, has_x0, has_n, has_mask, true, false>;
  return error_block<C, function, has_x0, has_n, has_mask, false, true>;
}

// The common mean squared error has kernels without x0 or noise. Elsewhere what is absent is a block of zeros: the
// arithmetic outweighs its reading, and there are a third as many kernels to compile.
template <class C, Function function>
constexpr bool kLean = function == Function::mse && sizeof(C) == 4;

template <class C, Function function, bool has_mask>
ErrorKernel<C> error_kernel(bool has_x0, bool has_n, bool value, bool gradient) {
  if constexpr (kLean<C, function>) {
    if (has_x0 && !has_n) return error_kernel<C, function, true, false, has_mask>(value, gradient);
    if (!has_x0 && has_n) return error_kernel<C, function, false, true, has_mask>(value, gradient);
  }
  return error_kernel<C, function, true, true, has_mask>(value, gradient);
}

template <class C, Function function>
ErrorKernel<C> error_kernel(bool has_x0, bool has_n, bool has_mask, bool value, bool gradient) {
  return has_mask ? error_kernel<C, function, true>(has_x0, has_n, value, gradient)
                  : error_kernel<C, function, false>(has_x0, has_n, value, gradient);
}

template <class C>
ErrorKernel<C> error_kernel(const LossArguments& a) {
  const bool x0 = a.x0.data, n = a.n.kind != Noise::none, mask = a.mask.tensor.data;
  const bool value = a.sums, gradient = a.gradient.data;
  switch (a.function) {
    case Function::mse:
      return error_kernel<C, Function::mse>(x0, n, mask, value, gradient);
    case Function::l1:
      return error_kernel<C, Function::l1>(x0, n, mask, value, gradient);
    case Function::smooth_l1:
      return error_kernel<C, Function::smooth_l1>(x0, n, mask, value, gradient);
    case Function::pseudo_huber:
      return error_kernel<C, Function::pseudo_huber>(x0, n, mask, value, gradient);
    default:
      return error_kernel<C, Function::log_cosh>(x0, n, mask, value, gradient);
  }
}

template <class C>
void loss_units(const LossArguments& a, int64_t begin, int64_t end) {
  alignas(64) C prediction_buffer[kBlock], x0_buffer[kBlock], mask_buffer[kBlock], gradient_buffer[kBlock];
  NoiseBuffer<C> n_buffer;
  const ErrorKernel<C> kernel = error_kernel<C>(a);
  alignas(64) const C zeros[kBlock] = {};
  ErrorBlock<C> b{};
  b.x0 = b.n = zeros;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    Sums sums{};
    b.p = a.p.data ? at<C>(a.p, unit.row) : C(0);
    b.q = a.q.data ? at<C>(a.q, unit.row) : C(0);
    b.scale = a.scale.data ? at<C>(a.scale, unit.row) : C(1);
    b.c = a.c.data ? at<C>(a.c, unit.row) : C(1);
    b.factor = a.factor.data ? at<C>(a.factor, unit.row) : C(0);
    for (int done = 0; done < unit.length; done += kBlock) {
      const int64_t start = unit.start + done;
      b.count = unit.length - done < kBlock ? unit.length - done : kBlock;
      b.prediction = view<C>(a.prediction, start, b.count, prediction_buffer);
      if (a.x0.data) b.x0 = view<C>(a.x0, start, b.count, x0_buffer);
      if (a.n.kind != Noise::none) b.n = view<C>(a.n, a.layout, start, b.count, n_buffer);
      if (a.mask.tensor.data) b.mask = view<C>(a.mask, start, b.count, mask_buffer);
      if (a.gradient.data) b.gradient = place<C>(a.gradient, start, b.count, gradient_buffer);
      kernel(b, sums);
      if (a.gradient.data) commit(a.gradient, start, b.count, b.gradient);
    }
    if (a.sums) a.sums[unit.slot] = sums.total();
  });
}

// The sum of the mask over each unit.
template <class C>
void mask_sum_units(const MaskSumArguments& a, int64_t begin, int64_t end) {
  alignas(64) C buffer[kBlock];
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    Sums sums{};
    for (int done = 0; done < unit.length; done += kBlock) {
      const int count = unit.length - done < kBlock ? unit.length - done : kBlock;
      const C* mask = view<C>(a.mask, unit.start + done, count, buffer);
      for (int k = 0; k < count; k += kLanes) {
        Vector<C> values[kLanes / kWidth<C>];
        memcpy(values, mask + k, sizeof(values));
        sums.add(values);
      }
    }
    a.sums[unit.slot] = sums.total();
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
