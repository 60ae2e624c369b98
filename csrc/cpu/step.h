// One step of any linear sampler; see fastdiff/ops/step.py for the formula. Operations are in the reference's order.
#pragma once

#include "blocks.h"
#include "functions.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

template <class V>
FASTDIFF_INLINE V clamp(V x, V low, V high) {
  return x < low ? low : (x > high ? high : x);  // NaN stays
}

// Without a learned variance, a threshold and a mask: all in registers, nothing is read or written twice, so y may be x
// and the entry the oldest of the history. D: x, m, uncond, y, x0 and the model input, N: the noise. `rich`: there is
// guidance, history, an entry or a model input.
template <class D, class N, bool clips, bool noisy, bool rich>
void direct_step_blocks(const StepArguments& a, int64_t begin, int64_t end, int most) {
  typedef Compute<D> C;
  typedef Vector<C> V;
  alignas(64) D x_buffer[kBlock], m_buffer[kBlock], uncond_buffer[kBlock], x0_buffer[kBlock], y_buffer[kBlock],
      seen_buffer[kBlock];
  alignas(64) C past_buffers[kHistory][kBlock], entry_buffer[kBlock];
  NoiseBuffer<N> noise_buffer;
  const V high = fill(C(a.clip)), low = -high;
  for_blocks(a.layout, begin, end, most, [&](int64_t row, int64_t start, int count) {
    const C* columns = (const C*)a.table.data + row * a.table.stride;
    const C of_x = columns[p_x], of_m = columns[p_m], strength = columns[c_noise];
    const C from_x = columns[c_x], from_m = columns[c_m], from_x0 = columns[c_x0];
    const C keep_x = columns[h_x], keep_m = columns[h_m], keep_x0 = columns[h_x0], scale = columns[c_in];
    const D* x = view(a.x, start, count, x_buffer);
    const D* m = view(a.m, start, count, m_buffer);
    const N* n = noisy ? view(a.noise, a.layout, start, count, noise_buffer) : nullptr;
    D* y = place(a.y, start, count, y_buffer);
    D* x0_out = a.x0.data ? place(a.x0, start, count, x0_buffer) : nullptr;
    const D* uncond = rich && a.uncond.data ? view(a.uncond, start, count, uncond_buffer) : nullptr;
    const C guidance = rich && uncond ? at<C>(a.guidance, row) : C(1);
    C* entry = rich && a.entry.data ? place(a.entry, start, count, entry_buffer) : nullptr;
    D* seen = rich && a.model_input.data ? place(a.model_input, start, count, seen_buffer) : nullptr;
    const C* past[kHistory];
    int depth = 0;
    if constexpr (rich)
      for (; depth < kHistory && a.history[depth].data; ++depth)
        past[depth] = view(a.history[depth], start, count, past_buffers[depth]);
    for_twos<C>(count, [&](int k) __attribute__((always_inline)) {
      const Two<V> x_k = load_two<D>(x + k);
      Two<V> m_k = load_two<D>(m + k), x0, result;
      if (rich && uncond) {
        const Two<V> u_k = load_two<D>(uncond + k);
        m_k = {u_k.a + guidance * (m_k.a - u_k.a), u_k.b + guidance * (m_k.b - u_k.b)};
      }
      x0 = {of_x * x_k.a + of_m * m_k.a, of_x * x_k.b + of_m * m_k.b};
      if constexpr (clips) x0 = {clamp(x0.a, low, high), clamp(x0.b, low, high)};
      result = {from_x * x_k.a + from_m * m_k.a + from_x0 * x0.a, from_x * x_k.b + from_m * m_k.b + from_x0 * x0.b};
      if constexpr (rich) {
        for (int j = 0; j < depth; ++j) {
          const Two<V> past_k = load_two<D>(past[j] + k);
          const C factor = columns[c_h1 + j];
          result = {result.a + factor * past_k.a, result.b + factor * past_k.b};
        }
        if (entry) {
          const Two<V> kept = {keep_x * x_k.a + keep_m * m_k.a + keep_x0 * x0.a,
                               keep_x * x_k.b + keep_m * m_k.b + keep_x0 * x0.b};
          if constexpr (kSplit<D>)
            store_two(entry + k, unsplit(kept));
          else
            store_two(entry + k, kept);
        }
      }
      if constexpr (noisy) {
        const Two<V> n_k = load_two<D>(n + k);
        result = {result.a + strength * n_k.a, result.b + strength * n_k.b};
      }
      store_two(y + k, result);
      if (x0_out) store_two(x0_out + k, x0);
      if (rich && seen) store_two(seen + k, {scale * result.a, scale * result.b});
    });
    if (x0_out) commit(a.x0, start, count, x0_out);
    if (entry) commit(a.entry, start, count, entry);
    if (seen)
      for (int copy = 0; copy < a.copies; ++copy) commit(a.model_input, start + copy * a.layout.elements, count, seen);
    commit(a.y, start, count, y);
  });
}

// y = mask (k_x0 known + k_n z) + (1 - mask) y; the buffers are free to use.
template <class C>
FASTDIFF_INLINE void blend_known(const StepArguments& a, const C* columns, int64_t start, int count, C* y, C* buffer,
                                 C* mask_buffer, NoiseBuffer<C>& noise_buffer) {
  typedef Vector<C> V;
  const C* known = view<C>(a.known, start, count, buffer);
  const C* mask = view<C>(a.mask, start, count, mask_buffer);
  const bool noisy = a.known_noise.kind != Noise::none;
  const C* n = noisy ? view<C>(a.known_noise, a.layout, start, count, noise_buffer) : known;
  const C of_known = columns[k_x0], of_noise = columns[k_n];
  for (int k = 0; k < padded(count); k += kWidth<C>) {
    V kept = of_known * load(known + k);
    if (noisy) kept = kept + of_noise * load(n + k);
    const V share = load(mask + k);
    store(y + k, share * kept + (C(1) - share) * load(y + k));
  }
}

template <class C>
void step_blocks(const StepArguments& a, int64_t begin, int64_t end) {
  typedef Vector<C> V;
  constexpr int W = kWidth<C>;
  alignas(64) C x_buffer[kBlock], m_buffer[kBlock], guided[kBlock], other[kBlock], x0_values[kBlock], y_buffer[kBlock],
      entry_buffer[kBlock];
  alignas(64) C mask_buffer[kBlock], seen_buffer[kBlock];
  NoiseBuffer<C> noise_buffer;
  const bool clips = a.clip >= 0, scales = a.threshold.data;
  for_blocks(a.layout, begin, end, kBlock, [&](int64_t row, int64_t start, int count) {
    const int stop = padded(count);
    const C* columns = (const C*)a.table.data + row * a.table.stride;
    const V high = fill(C(a.clip)), low = -high;
    const V most = fill(scales ? at<C>(a.threshold, row) : C(1)), least = -most;
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
    // The entry may go where the oldest of the history is: that is read first.
    C* entry = !a.entry.data ? nullptr : a.history[0].data ? entry_buffer : place<C>(a.entry, start, count, entry_buffer);
    C* x0_out = a.x0.data ? place<C>(a.x0, start, count, x0_values) : x0_values;
    for (int k = 0; k < stop; k += W) {
      const V x_k = load(x + k), m_k = load(m + k);
      V x0 = columns[p_x] * x_k + columns[p_m] * m_k;
      if (clips) x0 = clamp(x0, low, high);
      if (scales) x0 = clamp(x0, least, most) / most;
      store(x0_out + k, x0);
      store(y + k, columns[c_x] * x_k + columns[c_m] * m_k + columns[c_x0] * x0);
      if (entry) store(entry + k, columns[h_x] * x_k + columns[h_m] * m_k + columns[h_x0] * x0);
    }
    if (a.x0.data) commit(a.x0, start, count, x0_out);

    for (int j = 0; j < kHistory && a.history[j].data; ++j) {
      const C* past = view<C>(a.history[j], start, count, other);
      const C factor = columns[c_h1 + j];
      for (int k = 0; k < stop; k += W) store(y + k, load(y + k) + factor * load(past + k));
    }
    if (entry) commit(a.entry, start, count, entry);
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
    if (a.mask.tensor.data) blend_known<C>(a, columns, start, count, y, other, mask_buffer, noise_buffer);
    if (a.model_input.data) {
      C* seen = place<C>(a.model_input, start, count, seen_buffer);
      const C factor = columns[c_in];
      for (int k = 0; k < stop; k += W) store(seen + k, factor * load(y + k));
      for (int copy = 0; copy < a.copies; ++copy) commit(a.model_input, start + copy * a.layout.elements, count, seen);
    }
    commit(a.y, start, count, y);
  });
}

template <class C>
void drawn_step_units(const StepArguments& a, int64_t begin, int64_t end);

template <class C>
void step_units(const StepArguments& a, int64_t begin, int64_t end) {
  if (a.noise.kind == Noise::drawn && !a.noise.sequence) return drawn_step_units<C>(a, begin, end);
  if (a.log_variance.data || a.threshold.data || a.mask.tensor.data) return step_blocks<C>(a, begin, end);
  const DType data = common(a.x.dtype, a.m, a.uncond, a.y, a.x0, a.model_input);
  const DType noise = a.noise.kind == Noise::given ? a.noise.tensor.dtype : DType::f32;
  const bool rich = a.uncond.data || a.history[0].data || a.entry.data || a.model_input.data;
  const bool noisy = a.noise.kind != Noise::none, clips = a.clip >= 0;
  bool memory = (!noisy || a.noise.kind == Noise::given) && !a.y.streamed && !a.x0.streamed && !a.entry.streamed;
  for (const Input& past : a.history) memory = memory && common(kCode<C>, past) == kCode<C>;
  for_storage<C>(data, noise, [&](auto d, auto n) {
    typedef decltype(d) D;
    typedef decltype(n) N;
    const bool direct = memory && data == kCode<D> && (noise == kCode<N> || !noisy);
    auto kernel = rich ? direct_step_blocks<D, C, false, false, true> : direct_step_blocks<D, C, false, false, false>;
    if (noisy && clips)
      kernel = rich ? direct_step_blocks<D, N, true, true, true> : direct_step_blocks<D, N, true, true, false>;
    else if (noisy)
      kernel = rich ? direct_step_blocks<D, N, false, true, true> : direct_step_blocks<D, N, false, true, false>;
    else if (clips)
      kernel = rich ? direct_step_blocks<D, C, true, false, true> : direct_step_blocks<D, C, true, false, false>;
    kernel(a, begin, end, direct ? kUnit : kBlock);
  });
}

// With noise that torch.randn would draw: who has the last unit leaves the state that follows.
template <class C>
void drawn_step_units(const StepArguments& a, int64_t begin, int64_t end) {
  static_assert(kBlock % 16 == 0 && kUnit % 16 == 0, "blocks are whole chunks");
  twister::Sequence sequence;
  twister::start(sequence, *a.noise.draws, begin * kUnit / 16);
  StepArguments with = a;
  with.noise.sequence = &sequence;
  step_units<C>(with, begin, end);
  if (end * kUnit >= a.layout.elements) twister::finish(sequence, *a.noise.draws);
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
