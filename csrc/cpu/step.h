// One step of any linear sampler; see fastdiff/ops/step.py for the formula. Operations are in the reference's order.
#pragma once

#include "blocks.h"
#include "functions.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

template <class C>
void step_units(const StepArguments& a, int64_t begin, int64_t end) {
  typedef Vector<C> V;
  constexpr int W = kWidth<C>;
  alignas(64) C x_buffer[kBlock], m_buffer[kBlock], guided[kBlock], other[kBlock], x0_values[kBlock], y_buffer[kBlock],
      entry_buffer[kBlock];
  NoiseBuffer<C> noise_buffer;
  const bool clips = a.clip >= 0;
  const V high = fill(C(a.clip)), low = -high;
  for_blocks(a.layout, begin, end, [&](int64_t row, int64_t start, int count) {
    const int stop = padded(count);
    const C* columns = (const C*)a.table.data + row * a.table.stride;
    const C* x = view<C>(a.x, start, count, x_buffer);
    const C* m = view<C>(a.m, start, count, m_buffer);
    if (a.uncond.data) {
      const C* uncond = view<C>(a.uncond, start, count, other);
      const C guidance = at<C>(a.guidance, row);
      for (int k = 0; k < stop; k += W)
        store(guided + k, load(uncond + k) + guidance * (load(m + k) - load(uncond + k)));
      m = guided;
    }

    C* y = place<C>(a.y, start, count, y_buffer);
    C* entry = a.entry.data ? place<C>(a.entry, start, count, entry_buffer) : nullptr;
    C* x0_out = a.x0.data ? place<C>(a.x0, start, count, x0_values) : x0_values;
    for (int k = 0; k < stop; k += W) {
      const V x_k = load(x + k), m_k = load(m + k);
      V x0 = columns[p_x] * x_k + columns[p_m] * m_k;
      if (clips) x0 = x0 < low ? low : (x0 > high ? high : x0);  // NaN stays
      store(x0_out + k, x0);
      store(y + k, columns[c_x] * x_k + columns[c_m] * m_k + columns[c_x0] * x0);
      if (entry) store(entry + k, columns[h_x] * x_k + columns[h_m] * m_k + columns[h_x0] * x0);
    }
    if (a.x0.data) commit(a.x0, start, count, x0_out);
    if (entry) commit(a.entry, start, count, entry);

    for (int j = 0; j < kHistory && a.history[j].data; ++j) {
      const C* past = view<C>(a.history[j], start, count, other);
      const C factor = columns[c_h1 + j];
      for (int k = 0; k < stop; k += W) store(y + k, load(y + k) + factor * load(past + k));
    }
    if (a.noise.kind != Noise::none) {
      const C* n = view<C>(a.noise, a.layout, start, count, noise_buffer);
      const C strength = columns[c_noise];
      if (a.log_variance.data) {
        const C* v = view<C>(a.log_variance, start, count, other);
        for (int k = 0; k < stop; k += W) {
          const V spread = exponential(C(0.5) * (columns[l_0] + columns[l_v] * load(v + k)));
          store(y + k, load(y + k) + strength * spread * load(n + k));
        }
      } else {
        for (int k = 0; k < stop; k += W) store(y + k, load(y + k) + strength * load(n + k));
      }
    }
    commit(a.y, start, count, y);
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
