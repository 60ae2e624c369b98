// The error functions: which there are, for all units, and what they compute, for those that are compiled for an
// instruction set. Python has the same names in this order (fastdiff/losses/error_functions.py).
#pragma once

#define FASTDIFF_FUNCTIONS(X) X(mse) X(l1) X(smooth_l1) X(pseudo_huber) X(log_cosh)

namespace fastdiff {

#define FASTDIFF_NAME(name) name,
enum class Function : int { FASTDIFF_FUNCTIONS(FASTDIFF_NAME) combined };  // combined: a weighted sum of the others
#undef FASTDIFF_NAME

#define FASTDIFF_ONE(name) +1
constexpr int kFunctions = FASTDIFF_FUNCTIONS(FASTDIFF_ONE);
#undef FASTDIFF_ONE

// Whether an error function has a constant c.
constexpr bool needs_c(Function function) {
  return function == Function::smooth_l1 || function == Function::pseudo_huber;
}

}  // namespace fastdiff

#ifdef FASTDIFF_VARIANT
#include "functions.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

// rho(e; c); the forms, and the order of their operations, are those of the reference.
template <Function function, class V>
FASTDIFF_INLINE V error(V e, V c) {
  if constexpr (function == Function::mse) {
    return e * e;
  } else if constexpr (function == Function::log_cosh) {
    return log_cosh(e);
  } else {
    const V size = absolute(e);
    if constexpr (function == Function::l1) return size;
    if constexpr (function == Function::smooth_l1) return size < c ? e / 2 * e / c : size - c / 2;
    if constexpr (function == Function::pseudo_huber) {
      const V root = hypotenuse(size, c);
      return size * (root == V{} + __builtin_inf() ? V{} + 1 : size / (root + c));
    }
  }
}

// d rho / d e; 0 at the corner of |e|.
template <Function function, class V>
FASTDIFF_INLINE V derivative(V e, V c) {
  if constexpr (function == Function::mse) return e * 2;
  if constexpr (function == Function::l1) return sign(e);
  if constexpr (function == Function::smooth_l1) return absolute(e) < c ? e / c : sign(e);
  if constexpr (function == Function::pseudo_huber) {
    const V root = hypotenuse(absolute(e), c);
    return root == V{} + __builtin_inf() ? sign(e) : e / root;
  }
  if constexpr (function == Function::log_cosh) return hyperbolic_tangent(e);
}

// The strength and the constant of each function in a weighted sum. One of strength 0 is left out.
template <class C>
struct Parts {
  C strengths[kFunctions], constants[kFunctions];
};

// As above, of one function or, where it is `combined`, of the weighted sum.
template <Function function, class V, class C>
FASTDIFF_INLINE V error(V e, V c, const Parts<C>* parts) {
  if constexpr (function != Function::combined) {
    return error<function>(e, c);
  } else {
    V total{};
#define FASTDIFF_ADD(name)                                                     \
  if (const C strength = parts->strengths[int(Function::name)]; strength != 0) \
    total = total + strength * error<Function::name>(e, fill(parts->constants[int(Function::name)]));
    FASTDIFF_FUNCTIONS(FASTDIFF_ADD)
#undef FASTDIFF_ADD
    return total;
  }
}

template <Function function, class V, class C>
FASTDIFF_INLINE V derivative(V e, V c, const Parts<C>* parts) {
  if constexpr (function != Function::combined) {
    return derivative<function>(e, c);
  } else {
    V total{};
#define FASTDIFF_ADD(name)                                                     \
  if (const C strength = parts->strengths[int(Function::name)]; strength != 0) \
    total = total + strength * derivative<Function::name>(e, fill(parts->constants[int(Function::name)]));
    FASTDIFF_FUNCTIONS(FASTDIFF_ADD)
#undef FASTDIFF_ADD
    return total;
  }
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
#endif
