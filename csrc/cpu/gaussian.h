// The terms of the variational bound: weight rho + simple_weight e^2, e = prediction - (p x0 + q n), its sum over each
// unit, and the gradient by the network's output, in one pass. The formulas are those of the reference
// (backends/reference/gaussian_terms.py), which says why they keep their digits.
#pragma once

#include "loss.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// Interpolations at Chebyshev points, good to 1.1 units of 2^-24.
// (exp(z) - 1 - z) / z^2, for |z| <= 1.
constexpr float kExcess[] = {2.80628026e-6f, 2.53585122e-5f, 1.98381020e-4f, 1.38853969e-3f,
                             8.33333968e-3f, 4.16667366e-2f, 1.66666666e-1f, 4.99999998e-1f};
// 2 artanh(w) / w by w^2, for |w| <= 1/3: ln((1 + w) / (1 - w)).
constexpr float kLogarithm[] = {2.81577784e-1f, 2.79651577e-1f, 4.00245952e-1f, 6.66663216e-1f, 2.00000001f};

FASTDIFF_INLINE Floats exp_excess(Floats z) { return z * z * polynomial(z, kExcess); }

FASTDIFF_INLINE Floats twice_artanh(Floats w) { return w * polynomial(w * w, kLogarithm); }

// ln(1 + x), for x from 0 to 1.
FASTDIFF_INLINE Floats log_1_plus(Floats x) { return twice_artanh(x / (2.0f + x)); }

// ln x for normal numbers; about -88 for 0 and denormal ones.
FASTDIFF_INLINE Floats logarithm(Floats x) {
  const Ints bits = (Ints)x, exponent = (bits - 0x3F3504F3) >> 23;  // so that the fraction is from sqrt(1/2) to sqrt(2)
  const Floats fraction = (Floats)(bits - (exponent << 23));
  const Floats log = twice_artanh((fraction - 1.0f) / (fraction + 1.0f));
  return x != x ? x : fused(__builtin_convertvector(exponent, Floats), fill(kLn2), log);
}

FASTDIFF_INLINE Doubles exp_excess(Doubles z) {
  Doubles series{}, factorial = fill(1.0);
  // z^2 / 2! + ... + z^19 / 19!, by Horner.
  for (int k = 19; k >= 2; --k) series = (series + factorial) * z / double(k);
  return series * z;
}

FASTDIFF_INLINE Doubles log_1_plus(Doubles x) {
  for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_log1p(x[k]);
  return x;
}

FASTDIFF_INLINE Doubles logarithm(Doubles x) {
  for (int k = 0; k < kWidth<double>; ++k) x[k] = __builtin_log(x[k]);
  return x;
}

template <class V>
struct GaussianTerm {
  V rho, by_d, by_log_variance;
};

// Of a row; `none`: the term has weight 0.
enum class Gaussian { divergence, density, bin, none };

template <Gaussian kind, class V, class C>
FASTDIFF_INLINE GaussianTerm<V> gaussian(V d, V log_variance, V precision, C l_q, C exp_l_q) {
  const V by_d = d * precision;
  V constant, growth;  // exp(z) - 1
  if constexpr (kind == Gaussian::divergence) {
    const V z = l_q - log_variance;
    const auto near = absolute(z) < C(1);
    const V excess = exp_excess(near ? z : V{});
    growth = near ? z + excess : fused(precision, fill(exp_l_q), fill(C(-1)));
    constant = near ? excess : growth - z;
  } else {
    growth = fill(C(-1));
    constant = log_variance + C(1.8378770664093454836);  // ln(2 pi)
  }
  return {C(0.5) * fused(d, by_d, constant), by_d, C(-0.5) * fused(d, by_d, growth)};
}

template <class V, class C>
FASTDIFF_INLINE V within(V a, C bound) {  // NaN stays
  return a > bound ? fill(bound) : (a < -bound ? fill(-bound) : a);
}

template <class V, class C>
FASTDIFF_INLINE GaussianTerm<V> gaussian_bin(V d, V inverse_deviation, V x0, C half_width) {
  const C scale = C(1.5957691216057307117), k = C(0.044715), k3 = C(0.134145);  // 2 sqrt(2 / pi)
  const V zero{}, one = fill(C(1));
  const auto lower = x0 < C(-0.999), upper = x0 > C(0.999);
  const V plus = within((half_width - d) * inverse_deviation, C(1e4));
  const V minus = within((-half_width - d) * inverse_deviation, C(1e4));
  const V width = scale * C(2) * half_width * inverse_deviation;
  const V squares = fused(plus, plus + minus, minus * minus);
  const V a = scale * plus * fused(k * plus, plus, one), b = scale * minus * fused(k * minus, minus, one);
  const V apart = width * fused(fill(k), squares, one);  // a - b
  // ln sigmoid(a), ln sigmoid(-b), sigmoid(-a), sigmoid(b)
  const V of_a = exponential(-absolute(a)), of_b = exponential(-absolute(b));
  const V log_a = (a > zero ? zero : a) - log_1_plus(of_a), log_b = (b < zero ? zero : -b) - log_1_plus(of_b);
  V slope_a = (a > zero ? of_a : one) / (one + of_a), slope_b = (b < zero ? of_b : one) / (one + of_b);
  // 1 - exp(-apart), its logarithm, and 1 / (exp(apart) - 1)
  const auto near = apart < C(0.69314718055994530942);
  const V small = near ? apart : fill(C(0.5)), falls = exponential(-apart);
  const V between = near ? small - exp_excess(-small) : one - falls;
  V ratio = falls / between;
  const V log_between = near ? logarithm(between) : -log_1_plus(near ? one : ratio);
  const V value = (upper ? zero : log_a) + (lower ? zero : log_b) + (lower | upper ? zero : log_between);
  ratio = lower | upper ? zero : ratio;
  slope_a = (upper ? zero : slope_a) * (scale * fused(k3 * plus, plus, one));
  slope_b = (lower ? zero : slope_b) * (scale * fused(k3 * minus, minus, one));
  const V turn = ratio * width * (k3 * (plus + minus)), stretch = ratio * width * fused(fill(k3), squares, one);
  const V by_d = inverse_deviation * (slope_a - slope_b + turn);
  const V by_log_variance = C(0.5) * (fused(slope_a, plus, stretch) - slope_b * minus);
  const C least = C(-27.631021115928548208);  // ln 1e-12
  const auto improbable = value < least;
  return {improbable ? fill(-least) : -value, improbable ? zero : by_d, improbable ? zero : by_log_variance};
}

// The pointers of what is absent lead to zeros.
template <class C>
struct GaussianBlock {
  const C *prediction, *v, *x0, *n, *data;  // data: x0 where the row is of bins, also where it is not in the target
  C *gradient, *v_gradient;
  C p, q, scale, l_0, l_v, l_q, exp_l_q, half_width, weight, simple_weight;
  C by_d, by_e, by_log_variance;  // what the derivatives are multiplied by
  bool frozen;
  int count;
};

template <class C, Gaussian kind, bool learned, bool gradient>
void gaussian_block(const GaussianBlock<C>& block, Sums<C>& total) {
  typedef Vector<C> V;
  const GaussianBlock<C> b = block;  // its own copy, which no store can change
  constexpr C exponent = kind == Gaussian::bin ? C(-0.5) : C(-1);
  const V shared = exponential(fill(exponent * b.l_0));
  auto one = [&](V m, V v, V x0, V n, V data, V& slope, V& v_slope) __attribute__((always_inline)) {
    const V e = m - (b.p * x0 + b.q * n);
    V terms = b.simple_weight != 0 ? b.simple_weight * (e * e) : V{};
    if constexpr (gradient) slope = b.simple_weight != 0 ? b.by_e * e : V{};
    if constexpr (kind != Gaussian::none) {
      const V d = b.scale * e;
      V log_variance = fill(b.l_0), power = shared;
      if constexpr (learned) {
        log_variance = fused(fill(b.l_v), v, log_variance);
        power = exponential(exponent * log_variance);
      }
      GaussianTerm<V> term;
      if constexpr (kind == Gaussian::bin)
        term = gaussian_bin(d, power, data, b.half_width);
      else
        term = gaussian<kind>(d, log_variance, power, b.l_q, b.exp_l_q);
      terms = terms + b.weight * term.rho;
      if constexpr (gradient) slope = b.frozen ? slope : slope + b.by_d * term.by_d;
      if constexpr (gradient && learned) v_slope = b.by_log_variance * term.by_log_variance;
    }
    return terms;
  };
  add_terms<C>(b.count, total, [&](int k) __attribute__((always_inline)) {
    const Two<V> m = load_two<C>(b.prediction + k), x0 = load_two<C>(b.x0 + k), n = load_two<C>(b.n + k);
    Two<V> v{}, data{}, slope{}, v_slope{}, terms;
    if constexpr (learned) v = load_two<C>(b.v + k);
    if constexpr (kind == Gaussian::bin) data = load_two<C>(b.data + k);
    terms.a = one(m.a, v.a, x0.a, n.a, data.a, slope.a, v_slope.a);
    terms.b = one(m.b, v.b, x0.b, n.b, data.b, slope.b, v_slope.b);
    if constexpr (gradient) store_two(b.gradient + k, slope);
    if constexpr (gradient && learned) store_two(b.v_gradient + k, v_slope);
    return terms;
  });
}

template <class C>
using GaussianKernel = void (*)(const GaussianBlock<C>&, Sums<C>&);

template <class C, Gaussian kind>
GaussianKernel<C> gaussian_kernel(bool learned, bool gradient) {
  if (learned) return gradient ? gaussian_block<C, kind, true, true> : gaussian_block<C, kind, true, false>;
  return gradient ? gaussian_block<C, kind, false, true> : gaussian_block<C, kind, false, false>;
}

template <class C>
GaussianKernel<C> gaussian_kernel(Gaussian kind, bool learned, bool gradient) {
  switch (kind) {
    case Gaussian::divergence:
      return gaussian_kernel<C, Gaussian::divergence>(learned, gradient);
    case Gaussian::density:
      return gaussian_kernel<C, Gaussian::density>(learned, gradient);
    case Gaussian::bin:
      return gaussian_kernel<C, Gaussian::bin>(learned, gradient);
    case Gaussian::none:
      break;
  }
  return gaussian_kernel<C, Gaussian::none>(learned, gradient);
}

template <class C>
void gaussian_units(const GaussianArguments& a, int64_t begin, int64_t end) {
  alignas(64) C prediction_buffer[kBlock], v_buffer[kBlock], x0_buffer[kBlock];
  alignas(64) C gradient_buffer[kBlock], v_gradient_buffer[kBlock];
  NoiseBuffer<C> n_buffer;
  alignas(64) const C zeros[kBlock] = {};
  const bool learned = a.l_v.data, gradient = a.gradient.data;
  const int64_t sample_size = learned ? a.layout.elements / a.layout.samples : a.layout.elements;
  GaussianBlock<C> b{};
  b.x0 = b.n = zeros;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    Sums<C> sums{};
    const auto row = [&](const Rows& rows, C absent) { return rows.data ? at<C>(rows, unit.row) : absent; };
    b.p = row(a.p, C(0));
    b.q = row(a.q, C(0));
    b.scale = row(a.scale, C(0));
    b.l_0 = row(a.l_0, C(0));
    b.l_v = row(a.l_v, C(0));
    b.l_q = row(a.l_q, C(0));
    b.exp_l_q = C(__builtin_exp(double(b.l_q)));
    b.half_width = row(a.half_width, C(-1));
    b.weight = row(a.weight, C(0));
    b.simple_weight = row(a.simple_weight, C(0));
    const C factor = row(a.factor, C(0));
    b.frozen = a.freeze_mean;
    b.by_d = factor * b.weight * b.scale;
    b.by_e = factor * b.simple_weight * C(2);
    b.by_log_variance = factor * b.weight * b.l_v;
    // NaN is a bin: its terms are NaN.
    const Gaussian kind = b.weight == 0        ? Gaussian::none
                          : b.half_width < 0   ? Gaussian::divergence
                          : b.half_width == 0  ? Gaussian::density
                                               : Gaussian::bin;
    // A row whose weights are 0 adds 0, whatever it holds.
    const bool left_out = b.weight == 0 && b.simple_weight == 0;
    const GaussianKernel<C> kernel = gaussian_kernel<C>(kind, learned, gradient);
    for_halves(unit, sample_size, [&](int64_t start, int64_t first, int64_t second, int count) {
      b.count = count;
      if (gradient) b.gradient = place(a.gradient, first, count, gradient_buffer);
      if (gradient && learned) b.v_gradient = place(a.gradient, second, count, v_gradient_buffer);
      if (!left_out) {
        b.prediction = view(a.output, first, count, prediction_buffer);
        if (learned) b.v = view(a.output, second, count, v_buffer);
        if (a.p.data || kind == Gaussian::bin) b.data = view(a.x0, start, count, x0_buffer);
        if (a.p.data) b.x0 = b.data;
        if (a.n.kind != Noise::none) b.n = view(a.n, a.layout, start, count, n_buffer);
        kernel(b, sums);
      }
      const auto stored = [&](C* slope, int64_t to) {
        if (left_out) memset(slope, 0, size_t(count) * sizeof(C));
        commit(a.gradient, to, count, slope);
      };
      if (gradient) stored(b.gradient, first);
      if (gradient && learned) stored(b.v_gradient, second);
    });
    if (a.sums) a.sums[unit.slot] = sums.total();
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
