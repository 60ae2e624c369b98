// The numbers that Python and the kernels share. Python has its own lists of the names, in this order
// (fastdiff/codes.py); fastdiff._C tells which it was built with, and a test compares the two.
#pragma once

#define FASTDIFF_COLUMNS(X)                                                                                            \
  X(p_x) X(p_m) X(c_x) X(c_m) X(c_x0) X(c_h1) X(c_h2) X(c_h3) X(c_h4) X(c_noise) X(l_0) X(l_v) X(h_x) X(h_m) X(h_x0)    \
  X(k_x0) X(k_n) X(c_in)
#define FASTDIFF_FUNCTIONS(X) X(mse) X(l1) X(smooth_l1) X(pseudo_huber) X(log_cosh)
#define FASTDIFF_REDUCTIONS(X) X(mean) X(sum) X(none)
#define FASTDIFF_NORMALIZATIONS(X) X(none) X(row) X(global)
#define FASTDIFF_MOMENTS(X) X(aa) X(ab) X(bb) X(ss) X(l1) X(b1) X(a) X(b)
#define FASTDIFF_DTYPES(X) X(f32) X(f64) X(bf16) X(f16) X(u8)
// Of a coefficient program (fastdiff/program.py): those of no, one, two and three registers.
#define FASTDIFF_OPERATIONS_0(X) X(input) X(number) X(lookup)
#define FASTDIFF_OPERATIONS_1(X)                                                                                       \
  X(neg) X(abs) X(sign) X(sqrt) X(reciprocal) X(exp) X(log) X(expm1) X(log1p) X(sin) X(cos) X(tan) X(atan) X(tanh)      \
  X(sigmoid) X(erf) X(ndtri) X(floor) X(ceil) X(trunc) X(isnan) X(isinf) X(not)
#define FASTDIFF_OPERATIONS_2(X)                                                                                       \
  X(add) X(sub) X(mul) X(div) X(pow) X(hypot) X(maximum) X(minimum) X(eq) X(lt) X(le) X(and) X(or)
#define FASTDIFF_OPERATIONS_3(X) X(where)
#define FASTDIFF_OPERATIONS(X)                                                                                         \
  FASTDIFF_OPERATIONS_0(X) FASTDIFF_OPERATIONS_1(X) FASTDIFF_OPERATIONS_2(X) FASTDIFF_OPERATIONS_3(X)

namespace fastdiff {

#define FASTDIFF_NAME(name) name,

// The columns of a table of sampler steps.
enum Column { FASTDIFF_COLUMNS(FASTDIFF_NAME) kColumns };
constexpr int kHistory = 4;

enum class Function : int { FASTDIFF_FUNCTIONS(FASTDIFF_NAME) };
enum class Reduction : int { FASTDIFF_REDUCTIONS(FASTDIFF_NAME) };
enum class Normalization : int { FASTDIFF_NORMALIZATIONS(FASTDIFF_NAME) };
enum class Moment : int { FASTDIFF_MOMENTS(FASTDIFF_NAME) };  // of rows
enum class DType : int { FASTDIFF_DTYPES(FASTDIFF_NAME) };
constexpr int kInt64 = 5;  // of indices, behind those of data

#undef FASTDIFF_NAME

#define FASTDIFF_ONE(name) +1
constexpr int kFunctions = FASTDIFF_FUNCTIONS(FASTDIFF_ONE);
constexpr int kMoments = FASTDIFF_MOMENTS(FASTDIFF_ONE);
#undef FASTDIFF_ONE

// Whether an error function has a constant c.
constexpr bool needs_c(Function function) {
  return function == Function::smooth_l1 || function == Function::pseudo_huber;
}

}  // namespace fastdiff
