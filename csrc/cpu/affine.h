// Noise on its own, noising and conversion: affine maps with one set of coefficients a row.
#pragma once

#include "blocks.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// Noise of a slice of each sample: run by run of elements that are neighbours in the whole sample too.
inline void make_windowed(const NormalArguments& a, int64_t start, int count, float* n) {
  const int64_t sample_size = a.layout.elements / a.layout.samples;
  const Strides& at = a.window.at;
  const int last = at.dims - 1;
  const int64_t run = at.sizes[last];
  for (int done = 0; done < count;) {
    const int64_t element = (start + done) % sample_size, within = element % run;
    int64_t rest = element / run, place = a.window.first + within;
    for (int d = last - 1; d >= 0; --d) {
      place += rest % at.sizes[d] * at.strides[d];
      rest /= at.sizes[d];
    }
    const int part = run - within < count - done ? int(run - within) : count - done;
    const uint64_t sample = a.noise.samples[(start + done) / sample_size];
    normal_elements(a.noise.seed, a.noise.stream, sample, uint64_t(place), part, n + done);
    done += part;
  }
}

inline void normal_units(const NormalArguments& a, int64_t begin, int64_t end) {
  NoiseBuffer<float> n;
  for_blocks(a.layout, begin, end, kBlock, [&](int64_t, int64_t start, int count) {
    if (a.window.at.dims)
      make_windowed(a, start, count, n.values);
    else
      make_noise(a.noise, a.layout, start, count, n.values);
    commit(a.out, start, count, n.values);
  });
}

// x_t = alpha x0 + sigma (n + perturbation xi), every operation rounded by itself as in the reference. D: x0 and x_t,
// N: n, where they are stored in just that.
template <class D, class N>
void noise_blocks(const NoiseArguments& a, int64_t begin, int64_t end, int most) {
  typedef Compute<D> C;
  alignas(64) D x0_buffer[kBlock], out_buffer[kBlock];
  NoiseAhead<N> ahead;
  NoiseBuffer<C> xi_buffer;
  Packed packed;
  const C perturbation = C(a.perturbation);
  for_blocks(a.layout, begin, end, most, [&](int64_t row, int64_t start, int count) {
    const N* n = ahead.view(a.n, a.layout, start, count);
    if (a.keep.data) commit(a.keep, start, count, n);
    if (!a.x_t.data) return;
    const D* x0 = view(a.x0, start, count, x0_buffer);
    D* out = place(a.x_t, a.order, start, count, out_buffer);
    const C alpha = at<C>(a.alpha, row), sigma = at<C>(a.sigma, row);
    if (a.xi.kind == Noise::none) {
      for_twos<C>(count, [&](int k) {
        const auto x = load_two<D>(x0 + k), z = load_two<D>(n + k);
        store_two(out + k, {alpha * x.a + sigma * z.a, alpha * x.b + sigma * z.b});
      });
    } else {
      const C* xi = view(a.xi, a.layout, start, count, xi_buffer);
      for_twos<C>(count, [&](int k) {
        const auto x = load_two<D>(x0 + k), z = load_two<D>(n + k), w = load_two<D>(xi + k);
        store_two(out + k, {alpha * x.a + sigma * (z.a + perturbation * w.a),
                            alpha * x.b + sigma * (z.b + perturbation * w.b)});
      });
    }
    commit(a.x_t, a.order, start, count, out, packed);
  });
}

template <class C>
void noise_units(const NoiseArguments& a, int64_t begin, int64_t end) {
  const DType n = a.n.kind == Noise::given ? a.n.tensor.dtype : DType::f32;
  const DType data = common(a.x0.dtype, a.x_t), noise = common(n, a.keep);
  for_storage<C>(data, noise, [&](auto d, auto n) {
    typedef decltype(d) D;
    typedef decltype(n) N;
    const bool buffered = a.n.kind == Noise::made || a.xi.kind != Noise::none || a.x_t.streamed || a.order.at.dims;
    const bool direct = data == kCode<D> && noise == kCode<N> && !buffered;
    noise_blocks<D, N>(a, begin, end, direct ? kUnit : kBlock);
  });
}

// k_x x_t + k_m m
template <class D>
void convert_blocks(const ConvertArguments& a, int64_t begin, int64_t end, int most) {
  typedef Compute<D> C;
  alignas(64) D x_buffer[kBlock], m_buffer[kBlock], out_buffer[kBlock];
  for_blocks(a.layout, begin, end, most, [&](int64_t row, int64_t start, int count) {
    const D* x = view(a.x_t, start, count, x_buffer);
    const D* m = view(a.m, start, count, m_buffer);
    D* out = place(a.out, start, count, out_buffer);
    const C k_x = at<C>(a.k_x, row), k_m = at<C>(a.k_m, row);
    for_twos<C>(count, [&](int k) {
      const auto x_k = load_two<D>(x + k), m_k = load_two<D>(m + k);
      store_two(out + k, {k_x * x_k.a + k_m * m_k.a, k_x * x_k.b + k_m * m_k.b});
    });
    commit(a.out, start, count, out);
  });
}

template <class C>
void convert_units(const ConvertArguments& a, int64_t begin, int64_t end) {
  const DType data = common(a.m.dtype, a.x_t, a.out);
  for_storage<C>(data, data, [&](auto d, auto) {
    typedef decltype(d) D;
    convert_blocks<D>(a, begin, end, data == kCode<D> && !a.out.streamed ? kUnit : kBlock);
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
