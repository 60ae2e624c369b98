// Moments of rows: their sums over each unit, and the gradient, each in one pass.
#pragma once

#include "blocks.h"
#include "functions.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// Element k of a unit goes to sum k mod kSums of its moment, whatever the width of a vector, and these are added up in
// one order. So a unit's sums have the same bits for every instruction set.
constexpr int kSums = 8, kParts = kSums / kWidth<double>;

struct MomentSums {
  Doubles parts[kMoments][kParts];

  FASTDIFF_INLINE Doubles& at(Moment moment, int part) { return parts[int(moment)][part]; }
  FASTDIFF_INLINE double total(int moment) const {
    double sums[kSums];
    memcpy(sums, parts[moment], sizeof(sums));
    for (int half = kSums / 2; half; half /= 2)
      for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
    return sums[0];
  }
};

// sum + x y of numbers that were C. The product of two that were float is exact, fused or not.
template <class C>
FASTDIFF_INLINE Doubles plus_product(Doubles sum, Doubles x, Doubles y) {
#if defined(FASTDIFF_AVX512) || defined(FASTDIFF_AVX2) || defined(__aarch64__)
  if constexpr (sizeof(C) == 4) return fused(x, y, sum);
#endif
  return sum + x * y;
}

FASTDIFF_INLINE Doubles load_doubles(const double* from) { return load(from); }
FASTDIFF_INLINE Doubles load_doubles(const float* from) {
  typedef float Halved __attribute__((vector_size(kBytes / 2)));
  Halved x;
  memcpy(&x, from, sizeof(x));
  return __builtin_convertvector(x, Doubles);
}

// Adds a block, which zeros fill up: they add nothing. In float64 from the elements on.
template <class C>
void add_moments(const C* a, const C* b, int count, MomentSums& total) {
  MomentSums sums = total;
  for (int k = 0; k < count; k += kSums) {
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      const Doubles x = load_doubles(a + k + j * kWidth<double>), y = load_doubles(b + k + j * kWidth<double>), s = x - y;
      sums.at(Moment::aa, j) = plus_product<C>(sums.at(Moment::aa, j), x, x);
      sums.at(Moment::ab, j) = plus_product<C>(sums.at(Moment::ab, j), x, y);
      sums.at(Moment::bb, j) = plus_product<C>(sums.at(Moment::bb, j), y, y);
      sums.at(Moment::ss, j) += s * s;
      sums.at(Moment::l1, j) += absolute(s);
      sums.at(Moment::b1, j) += absolute(y);
      sums.at(Moment::a, j) += x;
      sums.at(Moment::b, j) += y;
    }
  }
  total = sums;
}

template <class C>
void moments_units(const MomentsArguments& m, int64_t begin, int64_t end) {
  alignas(64) C a_buffer[kBlock], b_buffer[kBlock];
  alignas(64) const C zeros[kBlock] = {};  // in place of an absent b
  const bool direct = m.a.dtype == kCode<C> && m.b.data && m.b.dtype == kCode<C>;
  for_units(m.layout, begin, end, [&](const Unit& unit) {
    MomentSums sums{};
    for_blocks(unit, direct ? kUnit : kBlock, [&](int64_t start, int count) {
      const C* a = view(m.a, start, count, a_buffer);
      const C* b = m.b.data ? view(m.b, start, count, b_buffer) : zeros;
      add_moments(a, b, count, sums);
    });
    for (int k = 0; k < kMoments; ++k) m.sums[k * m.units + unit.slot] = sums.total(k);
  });
}

// The upstream gradients of one row. An absent one leaves its term out, whatever the elements hold: a mask of zeros.
template <class C>
struct Upstream {
  typedef typename Simd<C>::Bits Bits;
  Vector<C> factors[kMoments];
  Bits kept[kMoments];

  FASTDIFF_INLINE Vector<C> term(Moment moment, Vector<C> slope) const {
    return (Vector<C>)((Bits)(factors[int(moment)] * slope) & kept[int(moment)]);
  }
};

// The terms in the order of the reference, rounded one by one.
template <bool of_b, class C>
FASTDIFF_INLINE Vector<C> slope_of(const Upstream<C>& u, Vector<C> a, Vector<C> b) {
  typedef Vector<C> V;
  const V one = V{} + 1, s = a - b;
  if constexpr (of_b)
    return V{} + u.term(Moment::b, one) + u.term(Moment::bb, b * 2) + u.term(Moment::b1, sign(b)) +
           u.term(Moment::ab, a) + u.term(Moment::ss, s * -2) + u.term(Moment::l1, -sign(s));
  else
    return V{} + u.term(Moment::a, one) + u.term(Moment::aa, a * 2) + u.term(Moment::ab, b) +
           u.term(Moment::ss, s * 2) + u.term(Moment::l1, sign(s));
}

template <bool of_b, class C>
void moment_slopes(const Upstream<C>& upstream, const C* a, const C* b, int count, C* out) {
  const Upstream<C> u = upstream;
  for (int k = 0; k < count; k += kWidth<C>) store(out + k, slope_of<of_b>(u, load(a + k), load(b + k)));
}

template <class C>
void moments_gradient_units(const MomentsGradientArguments& m, int64_t begin, int64_t end) {
  alignas(64) C a_buffer[kBlock], b_buffer[kBlock], out_buffer[kBlock];
  alignas(64) const C zeros[kBlock] = {};
  for_units(m.layout, begin, end, [&](const Unit& unit) {
    Upstream<C> upstream;
    for (int k = 0; k < kMoments; ++k) {
      const bool there = m.upstream[k].data;
      upstream.factors[k] = fill(there ? at<C>(m.upstream[k], unit.row) : C(0));
      upstream.kept[k] = typename Simd<C>::Bits{} - (there ? 1 : 0);
    }
    for_blocks(unit, kBlock, [&](int64_t start, int count) {
      const C* a = view(m.a, start, count, a_buffer);
      const C* b = m.b.data ? view(m.b, start, count, b_buffer) : zeros;
      if (m.d_a.data) {
        C* out = place(m.d_a, start, count, out_buffer);
        moment_slopes<false>(upstream, a, b, count, out);
        commit(m.d_a, start, count, out);
      }
      if (m.d_b.data) {
        C* out = place(m.d_b, start, count, out_buffer);
        moment_slopes<true>(upstream, a, b, count, out);
        commit(m.d_b, start, count, out);
      }
    });
  });
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
