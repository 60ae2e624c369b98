// Noise on its own, noising and conversion: affine maps with one set of coefficients a row.
#pragma once

#include "blocks.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

inline void normal_units(const NormalArguments& a, int64_t begin, int64_t end) {
  for_blocks(a.layout, begin, end, [&](int64_t, int64_t start, int count) {
    NoiseBuffer<float> n;
    make_noise(a.noise, a.layout, start, count, n.values);
    commit(a.out, start, count, n.values);
  });
}

// x_t = alpha x0 + sigma (n + perturbation xi), every operation rounded by itself as in the reference.
template <class C>
void noise_units(const NoiseArguments& a, int64_t begin, int64_t end) {
  alignas(64) C x0_buffer[kBlock], out_buffer[kBlock];
  NoiseBuffer<C> n_buffer, xi_buffer;
  const C perturbation = C(a.perturbation);
  for_blocks(a.layout, begin, end, [&](int64_t row, int64_t start, int count) {
    const C* n = view<C>(a.n, a.layout, start, count, n_buffer);
    if (a.keep.data) commit(a.keep, start, count, n);
    if (!a.x_t.data) return;
    const C* x0 = view<C>(a.x0, start, count, x0_buffer);
    C* out = place<C>(a.x_t, start, count, out_buffer);
    const C alpha = at<C>(a.alpha, row), sigma = at<C>(a.sigma, row);
    if (a.xi.kind == Noise::none) {
      for (int k = 0; k < padded(count); k += kWidth<C>) store(out + k, alpha * load(x0 + k) + sigma * load(n + k));
    } else {
      const C* xi = view<C>(a.xi, a.layout, start, count, xi_buffer);
      for (int k = 0; k < padded(count); k += kWidth<C>)
        store(out + k, alpha * load(x0 + k) + sigma * (load(n + k) + perturbation * load(xi + k)));
    }
    commit(a.x_t, start, count, out);
  });
}

// k_x x_t + k_m m
template <class C>
void convert_units(const ConvertArguments& a, int64_t begin, int64_t end) {
  alignas(64) C x_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock];
  for_blocks(a.layout, begin, end, [&](int64_t row, int64_t start, int count) {
    const C* x = view<C>(a.x_t, start, count, x_buffer);
    const C* m = view<C>(a.m, start, count, m_buffer);
    C* out = place<C>(a.out, start, count, out_buffer);
    const C k_x = at<C>(a.k_x, row), k_m = at<C>(a.k_m, row);
    for (int k = 0; k < padded(count); k += kWidth<C>) store(out + k, k_x * load(x + k) + k_m * load(m + k));
    commit(a.out, start, count, out);
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
