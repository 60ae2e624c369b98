// The loss: e = scale (prediction - (p x0 + r y + q n)), the sum of mask rho(e; c) of each unit, and the gradient
// factor mask rho'(e) scale, in one pass.
#pragma once

#include "blocks.h"
#include "error_functions.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// Sixteen sums in float64: element k of a unit goes to sum k mod 16, whatever the width of a vector, and the sixteen
// are added up in one order. So a unit's sum has the same bits for every instruction set. D: the order of elements.
template <class D>
struct Sums {
  typedef Vector<Compute<D>> V;
  static constexpr int kDoubles = kWidth<double>, kTwo = 2 * kWidth<Compute<D>>;
  // As many vectors as hold a multiple of kLanes elements.
  static constexpr int kTwos = kTwo < kLanes ? kLanes / kTwo : 1;

  Doubles lanes[kLanes / kDoubles];

  FASTDIFF_INLINE void add(const Two<V> (&values)[kTwos]) {
#pragma GCC unroll 4
    for (int j = 0; j < kTwos; ++j) {
      if constexpr (sizeof(Compute<D>) == 8) {
        lanes[2 * j] += values[j].a;
        lanes[2 * j + 1] += values[j].b;
      } else {
        Doubles parts[4];
        widen(values[j].a, parts[0], parts[1]);
        widen(values[j].b, parts[2], parts[3]);
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) lanes[lane(j, part)] += parts[part];
      }
    }
  }
  // Where the sums of a quarter of two vectors of floats are, and which they are.
  static constexpr int lane(int two, int part) {
    return kTwo > kLanes ? (kSplit<D> ? part / 2 : part % 2) : 4 * two + part;
  }
  FASTDIFF_INLINE double total() const {
    double found[kLanes], sums[kLanes];
    memcpy(found, lanes, sizeof(found));
    for (int k = 0; k < kLanes; ++k) sums[k] = found[kSplit<D> ? place_of(k) : k];
    for (int half = kLanes / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    return sums[0];
  }
  static constexpr int place_of(int k) {
    const int two = kTwo < kLanes ? k / kTwo : 0, within = k % (kTwo < kLanes ? kTwo : kLanes);
    const int part = within % 2 * 2 + within / 2 / kDoubles;
    return kDoubles * lane(two, part) + within / 2 % kDoubles;
  }
};

// Adds the terms of a block of `count` elements, which two(k) gives for two vectors of them from k on. What lies behind
// the end counts as 0.
template <class C, class Body>
FASTDIFF_INLINE void add_terms(int count, Sums<C>& total, Body two) {
  typedef Vector<C> V;
  constexpr int kTwo = Sums<C>::kTwo, kTwos = Sums<C>::kTwos, kGroup = kTwo * kTwos;
  Sums<C> sums = total;
  Two<V> terms[kTwos];
  for (int k = 0; k < count; k += kGroup) {
    for (int j = 0; j < kTwos; ++j) terms[j] = two(k + j * kTwo);
    for (int j = count - k; j < kGroup; ++j) {
      V& part = j % kTwo / kWidth<C> ? terms[j / kTwo].b : terms[j / kTwo].a;
      part[j % kWidth<C>] = C(0);
    }
    sums.add(terms);
  }
  total = sums;
}

// D: how prediction, x0 and gradient are stored; N: the noise.
template <class D, class N>
struct ErrorBlock {
  typedef Compute<D> C;
  const D *prediction, *x0;
  const N* n;
  const C* mask;
  D* gradient;
  C p, q, scale, c, factor;
  int count;
  const Parts<C>* parts;  // of a weighted sum of error functions
};

template <class D, class N, Function function, bool has_x0, bool has_n, bool has_mask, bool value, bool gradient>
void error_block(const ErrorBlock<D, N>& block, Sums<D>& total) {
  typedef Compute<D> C;
  typedef Vector<C> V;
  const ErrorBlock<D, N> b = block;  // its own copy, which no store can change
  const V c = fill(b.c);
  Sums<D> sums = total;
  auto one = [&](V m, V x0, V n, V mask, V& slope) __attribute__((always_inline)) {
    V target{}, strength = fill(b.factor), rho{};
    if constexpr (has_x0) target = b.p * x0;
    if constexpr (has_x0 && has_n) target = target + b.q * n;
    if constexpr (!has_x0 && has_n) target = b.q * n;
    const V e = b.scale * (m - target);
    if constexpr (has_mask) strength = mask * strength;
    if constexpr (gradient) slope = strength * derivative<function>(e, c, b.parts) * b.scale;
    if constexpr (value) rho = error<function>(e, c, b.parts);
    if constexpr (value && has_mask) rho = mask * rho;
    // What is masked out adds 0, whatever it holds.
    if constexpr (gradient && has_mask) slope = mask != 0 ? slope : V{};
    if constexpr (value && has_mask) rho = mask != 0 ? rho : V{};
    return rho;
  };
  auto two = [&](int k) __attribute__((always_inline)) {
    const Two<V> m = load_two<D>(b.prediction + k);
    Two<V> x0{}, n{}, mask{}, slope{}, rho;
    if constexpr (has_x0) x0 = load_two<D>(b.x0 + k);
    if constexpr (has_n) n = load_two<D>(b.n + k);
    if constexpr (has_mask) mask = load_two<D>(b.mask + k);
    rho.a = one(m.a, x0.a, n.a, mask.a, slope.a);
    rho.b = one(m.b, x0.b, n.b, mask.b, slope.b);
    if constexpr (gradient) store_two(b.gradient + k, slope);
    return rho;
  };
  constexpr int kTwo = Sums<D>::kTwo, kTwos = Sums<D>::kTwos, kGroup = kTwo * kTwos;
  Two<V> rho[kTwos];
  int k = 0;
  for (; k + kGroup <= b.count; k += kGroup) {
#pragma GCC unroll 4
    for (int j = 0; j < kTwos; ++j) rho[j] = two(k + j * kTwo);
    if constexpr (value) sums.add(rho);
  }
  if (k < b.count) {
    for (int j = 0; j < kTwos; ++j) rho[j] = two(k + j * kTwo);
    // What lies behind the end counts as 0, also where an infinite scale has made a NaN of it.
    for (int j = 0; j < kGroup; ++j) {
      V& part = (kSplit<D> ? j % 2 : j % kTwo / kWidth<C>) ? rho[j / kTwo].b : rho[j / kTwo].a;
      if (k + j >= b.count) part[(kSplit<D> ? j % kTwo / 2 : j) % kWidth<C>] = C(0);
    }
    if constexpr (value) sums.add(rho);
  }
  total = sums;
}

template <class D, class N>
using ErrorKernel = void (*)(const ErrorBlock<D, N>&, Sums<D>&);

template <class D, class N, Function function, bool has_x0, bool has_n, bool has_mask>
ErrorKernel<D, N> error_kernel(bool value, bool gradient) {
  if (value && gradient) return error_block<D, N, function, has_x0, has_n, has_mask, true, true>;
  if (value) return error_block<D, N, function, has_x0, has_n, has_mask, true, false>;
  return error_block<D, N, function, has_x0, has_n, has_mask, false, true>;
}

// The common mean squared error has kernels without x0 or noise, and of 16-bit storage. Elsewhere what is absent is a
// block of zeros, and memory is converted through buffers: the arithmetic outweighs it, and there are far fewer kernels
// to compile.
template <class C>
constexpr bool lean(Function function) {
  return function == Function::mse && sizeof(C) == 4;
}

template <class D, class N, Function function, bool has_mask>
ErrorKernel<D, N> error_kernel(bool has_x0, bool has_n, bool value, bool gradient) {
  if constexpr (lean<Compute<D>>(function)) {
    if (has_x0 && !has_n) return error_kernel<D, N, function, true, false, has_mask>(value, gradient);
    if (!has_x0 && has_n) return error_kernel<D, N, function, false, true, has_mask>(value, gradient);
  }
  return error_kernel<D, N, function, true, true, has_mask>(value, gradient);
}

template <class D, class N, Function function>
ErrorKernel<D, N> error_kernel(const LossArguments& a) {
  const bool x0 = a.x0.data || a.y.data, n = a.n.kind != Noise::none, value = a.sums, gradient = a.gradient.data;
  return a.mask.tensor.data ? error_kernel<D, N, function, true>(x0, n, value, gradient)
                            : error_kernel<D, N, function, false>(x0, n, value, gradient);
}

template <class D, class N>
ErrorKernel<D, N> error_kernel(const LossArguments& a) {
  if constexpr (kComputed<D>) {
    switch (a.function) {
#define FASTDIFF_CASE(name) \
  case Function::name:      \
    return error_kernel<D, N, Function::name>(a);
      FASTDIFF_FUNCTIONS(FASTDIFF_CASE) FASTDIFF_CASE(combined)
#undef FASTDIFF_CASE
    }
  }
  return error_kernel<D, N, Function::mse>(a);
}

// p x0 + r y of a block, which stands for its x0 then: a rare operand costs no further kernels.
template <class C>
FASTDIFF_APART void add_third(C p, const C* x0, C r, const C* y, int count, C* out) {
  for (int k = 0; k < padded(count); ++k) out[k] = p * x0[k] + r * y[k];
}

// The parts of a weighted sum of error functions, for a row whose constant is c.
template <class C>
FASTDIFF_APART void set_parts(const Combination& from, C c, Parts<C>& to) {
  for (int k = 0; k < kFunctions; ++k) {
    to.strengths[k] = C(from.strengths[k]);
    to.constants[k] = from.of_row[k] ? c : C(from.constants[k]);
  }
}

template <class D, class N>
void loss_blocks(const LossArguments& a, int64_t begin, int64_t end, int most) {
  typedef Compute<D> C;
  alignas(64) D prediction_buffer[kBlock], x0_buffer[kBlock], gradient_buffer[kBlock];
  alignas(64) C mask_buffer[kBlock], y_buffer[kBlock], known[kBlock];
  NoiseBuffer<N> n_buffer;
  Packed packed;
  const ErrorKernel<D, N> kernel = error_kernel<D, N>(a);
  alignas(64) const D no_x0[kBlock] = {};
  alignas(64) const N no_noise[kBlock] = {};
  ErrorBlock<D, N> b{};
  Parts<C> parts;
  b.x0 = no_x0;
  b.n = no_noise;
  b.parts = &parts;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    Sums<D> sums{};
    b.p = a.y.data ? C(1) : a.p.data ? at<C>(a.p, unit.row) : C(0);
    b.q = a.q.data ? at<C>(a.q, unit.row) : C(0);
    b.scale = a.scale.data ? at<C>(a.scale, unit.row) : C(1);
    b.c = a.c.data ? at<C>(a.c, unit.row) : C(1);
    b.factor = a.factor.data ? at<C>(a.factor, unit.row) : C(0);
    if (a.function == Function::combined) set_parts(a.parts, b.c, parts);
    // A row of weight 0 adds 0, whatever it holds. Its sum may be asked for all the same: the weight's gradient is made
    // of it.
    const bool left_out = at<C>(a.weight, unit.row) == C(0), read = !left_out || a.every_sum;
    for_blocks(unit, most, [&](int64_t start, int count) {
      b.count = count;
      if (a.gradient.data) b.gradient = place(a.gradient, a.order, start, count, gradient_buffer);
      if (read) {
        b.prediction = view(a.prediction, a.order, start, count, prediction_buffer, packed);
        if (a.x0.data) b.x0 = view(a.x0, start, count, x0_buffer);
        if constexpr (__is_same(D, C)) {
          if (a.y.data) {
            const C p = a.p.data ? at<C>(a.p, unit.row) : C(0);
            add_third(p, a.x0.data ? b.x0 : no_x0, at<C>(a.r, unit.row), view(a.y, start, count, y_buffer), count, known);
            b.x0 = known;
          }
        }
        if (a.n.kind != Noise::none) b.n = view(a.n, a.layout, start, count, n_buffer);
        if (a.mask.tensor.data) b.mask = view(a.mask, start, count, mask_buffer);
        kernel(b, sums);
      }
      if (!a.gradient.data) return;
      if (left_out) memset(b.gradient, 0, size_t(count) * sizeof(D));
      commit(a.gradient, a.order, start, count, b.gradient, packed);
    });
    if (a.sums) a.sums[unit.slot] = sums.total();
  });
}

template <class C>
void loss_units(const LossArguments& a, int64_t begin, int64_t end) {
  const bool has_x0 = a.x0.data, has_n = a.n.kind != Noise::none, made = a.n.kind == Noise::made;
  if (!lean<C>(a.function) || a.y.data) return loss_blocks<C, C>(a, begin, end, kBlock);
  const DType data = common(a.prediction.dtype, a.x0, a.gradient);
  const DType noise = a.n.kind == Noise::given ? a.n.tensor.dtype : DType::f32;
  for_storage<C>(data, noise, [&](auto d, auto n) {
    typedef decltype(d) D;
    typedef decltype(n) N;
    const bool buffered = made || a.mask.tensor.data || a.gradient.streamed || !(has_x0 || has_n) || a.order.at.dims;
    const bool direct = data == kCode<D> && noise == kCode<N> && !buffered;
    loss_blocks<D, N>(a, begin, end, direct ? kUnit : kBlock);
  });
}

// Without sums: the errors of the elements, weight mask rho(e; c), or the gradient for an upstream gradient of each of
// them. What is absent is a block of zeros, or of ones for a mask.
template <class C>
struct ElementBlock {
  const C *prediction, *x0, *n, *mask, *d_errors;
  C *errors, *gradient;
  const Parts<C>* parts;
  C p, q, scale, c, weight;
  int count;
};

template <class C, Function function>
void element_block(const ElementBlock<C>& block) {
  typedef Vector<C> V;
  const ElementBlock<C> b = block;
  const V c = fill(b.c);
  for (int k = 0; k < b.count; k += kWidth<C>) {
    const V mask = load(b.mask + k), target = b.p * load(b.x0 + k) + b.q * load(b.n + k);
    const V e = b.scale * (load(b.prediction + k) - target);
    if (b.errors) {
      const V rho = b.weight * (mask * error<function>(e, c, b.parts));
      store(b.errors + k, mask != 0 ? rho : V{});
    }
    if (b.gradient) {
      const V strength = mask * (load(b.d_errors + k) * b.weight);
      const V slope = strength * derivative<function>(e, c, b.parts) * b.scale;
      store(b.gradient + k, mask != 0 ? slope : V{});
    }
  }
}

template <class C>
void (*element_kernel(Function function))(const ElementBlock<C>&) {
  switch (function) {
#define FASTDIFF_CASE(name) \
  case Function::name:      \
    return element_block<C, Function::name>;
    FASTDIFF_FUNCTIONS(FASTDIFF_CASE) FASTDIFF_CASE(combined)
#undef FASTDIFF_CASE
  }
  return element_block<C, Function::mse>;
}

template <class C>
void element_units(const LossArguments& a, int64_t begin, int64_t end) {
  alignas(64) C prediction_buffer[kBlock], x0_buffer[kBlock], y_buffer[kBlock], known[kBlock], mask_buffer[kBlock];
  alignas(64) C d_errors_buffer[kBlock], errors_buffer[kBlock], gradient_buffer[kBlock], ones[kBlock];
  alignas(64) const C zeros[kBlock] = {};
  NoiseBuffer<C> n_buffer;
  Packed packed, d_errors_packed;
  Parts<C> parts;
  const auto kernel = element_kernel<C>(a.function);
  for (C& one : ones) one = C(1);
  ElementBlock<C> b{};
  b.x0 = b.n = zeros;
  b.mask = ones;
  b.parts = &parts;
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    const C p = a.p.data ? at<C>(a.p, unit.row) : C(0);
    b.p = a.y.data ? C(1) : p;
    b.q = a.q.data ? at<C>(a.q, unit.row) : C(0);
    b.scale = a.scale.data ? at<C>(a.scale, unit.row) : C(1);
    b.c = a.c.data ? at<C>(a.c, unit.row) : C(1);
    b.weight = at<C>(a.weight, unit.row);
    if (a.function == Function::combined) set_parts(a.parts, b.c, parts);
    for_blocks(unit, kBlock, [&](int64_t start, int count) {
      b.count = count;
      b.errors = a.errors.data ? place(a.errors, a.order, start, count, errors_buffer) : nullptr;
      b.gradient = a.gradient.data ? place(a.gradient, a.order, start, count, gradient_buffer) : nullptr;
      if (b.weight == C(0)) {  // the row adds 0, whatever it holds
        if (b.errors) memset(b.errors, 0, size_t(count) * sizeof(C));
        if (b.gradient) memset(b.gradient, 0, size_t(count) * sizeof(C));
      } else {
        b.prediction = view(a.prediction, a.order, start, count, prediction_buffer, packed);
        if (a.x0.data) b.x0 = view(a.x0, start, count, x0_buffer);
        if (a.y.data) {
          const C* const y = view(a.y, start, count, y_buffer);
          add_third(p, a.x0.data ? b.x0 : zeros, at<C>(a.r, unit.row), y, count, known);
          b.x0 = known;
        }
        if (a.n.kind != Noise::none) b.n = view(a.n, a.layout, start, count, n_buffer);
        if (a.mask.tensor.data) b.mask = view(a.mask, start, count, mask_buffer);
        if (a.d_errors.data) b.d_errors = view(a.d_errors, a.order, start, count, d_errors_buffer, d_errors_packed);
        kernel(b);
      }
      if (b.errors) commit(a.errors, a.order, start, count, b.errors, packed);
      if (b.gradient) commit(a.gradient, a.order, start, count, b.gradient, packed);
    });
  });
}

// The sum of the mask over each unit.
template <class C>
void mask_sum_units(const MaskSumArguments& a, int64_t begin, int64_t end) {
  constexpr int kTwo = Sums<C>::kTwo, kTwos = Sums<C>::kTwos;
  alignas(64) C buffer[kBlock];
  for_units(a.layout, begin, end, [&](const Unit& unit) {
    Sums<C> sums{};
    for_blocks(unit, kBlock, [&](int64_t start, int count) {
      const C* mask = view<C>(a.mask, start, count, buffer);
      for (int k = 0; k < count; k += kTwo * kTwos) {
        Two<Vector<C>> values[kTwos];
        for (int j = 0; j < kTwos; ++j) values[j] = load_two<C>(mask + k + j * kTwo);
        sums.add(values);
      }
    });
    a.sums[unit.slot] = sums.total();
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
