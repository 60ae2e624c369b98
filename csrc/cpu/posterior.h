// An autoencoder's moments, each sample its means and then its log-variances: latents z and their noising alpha z +
// sigma n, the gradient of both, and the KL divergence from N(0, 1) with its gradient, in one pass each. The
// log-variance is clamped; where it is, its gradient is 0.
#pragma once

#include "gaussian.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

template <class C>
struct Clamp {
  typedef Vector<C> V;
  V least, most;

  FASTDIFF_INLINE Clamp(double least, double most) : least(fill(C(least))), most(fill(C(most))) {}
  FASTDIFF_INLINE V of(V x) const { return x < least ? least : (x > most ? most : x); }  // NaN stays
  FASTDIFF_INLINE V gradient(V x, V slope) const { return x >= least ? (x <= most ? slope : V{}) : V{}; }
};

// Values as they are when they have been stored.
template <class C>
FASTDIFF_APART void round_as_stored(DType dtype, int count, C* values) {
  alignas(64) double memory[kBlock];
  write(values, count, Output{memory, dtype, false}, 0);
  read(Input{memory, dtype}, 0, count, values);
}

// (mean + exp(log_variance / 2) xi - shift) scale, rounded operation by operation as in the reference.
template <class C>
FASTDIFF_APART void latents(const C* mean, const C* log_variance, const C* xi, Clamp<C> clamp, C shift, C scale, int count,
                            C* z) {
  for (int k = 0; k < count; k += kWidth<C>) {
    const Vector<C> deviation = exponential(C(0.5) * clamp.of(load(log_variance + k)));
    store(z + k, (load(mean + k) + deviation * load(xi + k) - shift) * scale);
  }
}

template <class C>
void posterior_units(const PosteriorArguments& a, int64_t begin, int64_t end) {
  alignas(64) C mean_buffer[kBlock], log_buffer[kBlock], z_buffer[kBlock], x_t_buffer[kBlock];
  NoiseBuffer<C> xi_buffer, n_buffer;
  const Clamp<C> clamp(a.least, a.most);
  const int64_t sample_size = a.layout.elements / a.layout.samples;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    const auto row = [&](const Rows& rows) { return rows.data ? at<C>(rows, unit.row) : C(0); };
    const C shift = row(a.shift), scale = row(a.scale), alpha = row(a.alpha), sigma = row(a.sigma);
    for_halves(unit, sample_size, [&](int64_t start, int64_t first, int64_t second, int count) {
      const C* mean = view(a.moments, first, count, mean_buffer);
      C* z = place(a.z, start, count, z_buffer);
      if (a.xi.kind == Noise::none) {
        for (int k = 0; k < count; k += kWidth<C>) store(z + k, (load(mean + k) - shift) * scale);
      } else {
        const C* log_variance = view(a.moments, second, count, log_buffer);
        latents(mean, log_variance, view(a.xi, a.layout, start, count, xi_buffer), clamp, shift, scale, count, z);
      }
      if (a.x_t.data) {
        if (a.z.dtype != kCode<C>) round_as_stored(a.z.dtype, count, z);
        const C* n = view(a.n, a.layout, start, count, n_buffer);
        if (a.keep.data) commit(a.keep, start, count, n);
        C* x_t = place(a.x_t, start, count, x_t_buffer);
        for (int k = 0; k < count; k += kWidth<C>) store(x_t + k, alpha * load(z + k) + sigma * load(n + k));
        commit(a.x_t, start, count, x_t);
      }
      commit(a.z, start, count, z);
    });
  });
}

template <class C>
void posterior_gradient_units(const PosteriorGradientArguments& a, int64_t begin, int64_t end) {
  typedef Vector<C> V;
  alignas(64) C log_buffer[kBlock], z_buffer[kBlock], x_t_buffer[kBlock], mean_slopes[kBlock], log_slopes[kBlock];
  alignas(64) const C zeros[kBlock] = {};
  NoiseBuffer<C> xi_buffer;
  const Clamp<C> clamp(a.least, a.most);
  const int64_t sample_size = a.layout.elements / a.layout.samples;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    const C scale = at<C>(a.scale, unit.row), alpha = a.d_x_t.data ? at<C>(a.alpha, unit.row) : C(0);
    for_halves(unit, sample_size, [&](int64_t start, int64_t first, int64_t second, int count) {
      const C* d_z = a.d_z.data ? view(a.d_z, start, count, z_buffer) : zeros;
      const C* d_x_t = a.d_x_t.data ? view(a.d_x_t, start, count, x_t_buffer) : zeros;
      C* by_mean = place(a.gradient, first, count, mean_slopes);
      C* by_log_variance = place(a.gradient, second, count, log_slopes);
      const bool sampled = a.xi.kind != Noise::none;
      const C* log_variance = sampled ? view(a.moments, second, count, log_buffer) : zeros;
      const C* xi = sampled ? view(a.xi, a.layout, start, count, xi_buffer) : zeros;
      for (int k = 0; k < count; k += kWidth<C>) {
        const V slope = scale * (load(d_z + k) + alpha * load(d_x_t + k)), x = load(log_variance + k);
        store(by_mean + k, slope);
        const V growth = sampled ? exponential(C(0.5) * clamp.of(x)) * load(xi + k) : V{};
        store(by_log_variance + k, clamp.gradient(x, C(0.5) * growth * slope));
      }
      commit(a.gradient, first, count, by_mean);
      commit(a.gradient, second, count, by_log_variance);
    });
  });
}

// Adds up (mean^2 + exp(v) - 1 - v) / 2 of the clamped log-variance v. The gradient is its derivative times `factor`.
template <class C, bool gradient>
FASTDIFF_APART void kl_block(const C* mean, const C* log_variance, Clamp<C> clamp, C factor, int count, C* by_mean,
                             C* by_log_variance, Sums<C>& total) {
  typedef Vector<C> V;
  add_terms<C>(count, total, [&](int k) __attribute__((always_inline)) {
    const auto one = [&](int k) __attribute__((always_inline)) {
      const V m = load(mean + k), x = load(log_variance + k), v = clamp.of(x);
      const auto near = absolute(v) < C(1);
      const V small = exp_excess(near ? v : V{});
      const V growth = near ? v + small : exponential(v) - C(1);  // exp(v) - 1
      const V excess = near ? small : growth - v;
      if constexpr (gradient) {
        store(by_mean + k, factor * m);
        store(by_log_variance + k, clamp.gradient(x, C(0.5) * factor * growth));
      }
      return C(0.5) * fused(m, m, excess);
    };
    const V first = one(k);
    return Two<V>{first, one(k + kWidth<C>)};
  });
}

template <class C>
void kl_normal_units(const KLNormalArguments& a, int64_t begin, int64_t end) {
  alignas(64) C mean_buffer[kBlock], log_buffer[kBlock], mean_slopes[kBlock], log_slopes[kBlock];
  const Clamp<C> clamp(a.least, a.most);
  const bool gradient = a.gradient.data;
  const int64_t sample_size = a.layout.elements / a.layout.samples;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    Sums<C> sums{};
    const C factor = a.factor.data ? at<C>(a.factor, unit.row) : C(0);
    // A row of weight 0 adds 0, whatever it holds.
    const bool left_out = at<C>(a.weight, unit.row) == C(0);
    for_halves(unit, sample_size, [&](int64_t, int64_t first, int64_t second, int count) {
      C* by_mean = gradient ? place(a.gradient, first, count, mean_slopes) : nullptr;
      C* by_log_variance = gradient ? place(a.gradient, second, count, log_slopes) : nullptr;
      if (!left_out) {
        const C* mean = view(a.moments, first, count, mean_buffer);
        const C* log_variance = view(a.moments, second, count, log_buffer);
        const auto block = gradient ? kl_block<C, true> : kl_block<C, false>;
        block(mean, log_variance, clamp, factor, count, by_mean, by_log_variance, sums);
      } else if (gradient) {
        memset(by_mean, 0, size_t(count) * sizeof(C));
        memset(by_log_variance, 0, size_t(count) * sizeof(C));
      }
      if (!gradient) return;
      commit(a.gradient, first, count, by_mean);
      commit(a.gradient, second, count, by_log_variance);
    });
    if (a.sums) a.sums[unit.slot] = sums.total();
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
