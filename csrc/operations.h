// From what a call is given to the kernel's arguments: one function for each operation, whoever calls.
#pragma once

#include "checks.h"
#include "cpu/run.h"
#include "unlocked.h"

namespace fastdiff {

// Python's objects, in the order of fastdiff._C's functions; see checks.h for what they are there. A caller sets those
// that it has. Coefficients that are prepared, and results that a call makes itself, it puts into the arguments.
struct NoiseOperands {
  PyObject *x0, *alpha, *sigma, *n, *perturbation, *xi, *x_t, *keep, *order;
};
struct ConvertOperands {
  PyObject *m, *x_t, *k_x, *k_m, *out;
};
struct LossOperands {
  PyObject *prediction, *x0, *n, *p, *q, *scale, *weight, *c, *mask, *y, *r, *function, *normalization, *reduction,
      *upstream, *result, *means, *gradient, *errors, *d_errors, *order;
};
struct GaussianOperands {
  PyObject *output, *x0, *n, *p, *q, *scale, *l_0, *l_v, *l_q, *half_width, *weight, *simple_weight, *freeze_mean,
      *reduction, *upstream, *result, *gradient;
};
struct PosteriorOperands {
  PyObject *moments, *xi, *shift, *scale, *n, *alpha, *sigma, *least, *most, *z, *x_t, *keep;
};
struct PosteriorGradientOperands {
  PyObject *moments, *xi, *scale, *alpha, *least, *most, *d_z, *d_x_t, *gradient;
};
struct KLNormalOperands {
  PyObject *moments, *weight, *least, *most, *reduction, *upstream, *result, *gradient;
};
struct MomentsOperands {
  PyObject *a, *b, *dtype, *results;  // results: a tuple, of each moment a tensor or None
};
struct MomentsGradientOperands {
  PyObject *a, *b, *upstream, *d_a, *d_b;  // upstream: a tuple, of each moment rows or None
};
struct StepOperands {
  PyObject *x, *m, *uncond, *guidance, *table, *clip, *history, *noise, *log_variance, *y, *x0, *entry, *threshold,
      *mask, *known, *known_noise, *model_input;
};

// Full-size inputs are read before rows: tensors decide the compute dtype of the coefficients that are made for them.
template <class Reader>
void fill(Reader& read, const NoiseOperands& from, NoiseArguments& to) {
  const int64_t elements = read.layout.elements;
  read.image("x0", from.x0, to.x0);
  read.noise("n", from.n, to.n);
  if (given(from.xi)) read.noise("xi", from.xi, to.xi);
  if (from.perturbation) to.perturbation = read.number("perturbation", from.perturbation);
  read.rows("alpha", from.alpha, to.alpha);
  read.rows("sigma", from.sigma, to.sigma);
  optional_output("x_t", from.x_t, elements, to.x_t);
  optional_output("keep", from.keep, elements, to.keep, read.compute());
  if (given(from.order)) to.order = parse_order(from.order, read.layout);
  to.layout = read.layout;
}

template <class Reader>
void fill(Reader& read, const ConvertOperands& from, ConvertArguments& to) {
  read.input("m", from.m, to.m);
  read.input("x_t", from.x_t, to.x_t);
  read.rows("k_x", from.k_x, to.k_x);
  read.rows("k_m", from.k_m, to.k_m);
  if (from.out) to.out = parse_output("out", from.out, read.layout.elements);
  to.layout = read.layout;
}

template <class Reader>
void fill(Reader& read, const LossOperands& from, LossCall& call) {
  LossArguments& to = call.kernel;
  const Layout& layout = read.layout;
  read.input("prediction", from.prediction, to.prediction);
  if (given(from.x0)) read.image("x0", from.x0, to.x0);
  if (given(from.y)) read.input("y", from.y, to.y);
  if (given(from.n)) read.noise("n", from.n, to.n);
  if (from.p != Py_None) read.rows("p", from.p, to.p);
  if (from.q != Py_None) read.rows("q", from.q, to.q);
  if (from.scale != Py_None) read.rows("scale", from.scale, to.scale);
  read.rows("weight", from.weight, to.weight);
  if (from.c != Py_None) read.rows("c", from.c, to.c);
  if (given(from.r)) read.rows("r", from.r, to.r);
  if (from.upstream != Py_None) read.rows("upstream", from.upstream, call.upstream);
  if (!to.p.data != !to.x0.data) read.refuse("x0", "goes with p, both or neither");
  if (!to.r.data != !to.y.data) read.refuse("y", "goes with r, both or neither");
  if (!to.q.data != (to.n.kind == Noise::none)) read.refuse("n", "goes with q, both or neither");
  if (given(from.mask)) read.mask(from.mask, to.mask);
  bool constant;
  if (PyTuple_Check(from.function)) {
    to.function = Function::combined;
    constant = parse_combination(read, from.function, to.parts);
  } else {
    to.function = Function(parse_code("function", from.function, kFunctions));
    constant = needs_c(to.function);
  }
  if (constant && !to.c.data) read.refuse("c", "this error function needs its constant");
  if (from.normalization) call.normalization = Normalization(parse_code("normalization", from.normalization, 3));
  if (from.reduction) call.reduction = Reduction(parse_code("reduction", from.reduction, 3));
  const bool reduced = call.reduction != Reduction::none;
  // A sum whose value is not wanted may be over errors that are reduced elsewhere, with a gradient for each row.
  if (call.upstream.stride && layout.rows > 1 && reduced && (call.reduction == Reduction::mean || given(from.result)))
    read.refuse("upstream", "a reduced loss has one upstream gradient");
  optional_output("result", from.result, reduced ? 1 : layout.rows, call.result, read.compute());
  Output means{};
  optional_output("means", from.means, layout.rows, means, DType::f64);
  call.means = (double*)means.data;
  optional_output("gradient", from.gradient, layout.elements, to.gradient);
  optional_output("errors", from.errors, layout.elements, to.errors, read.compute());
  if (given(from.d_errors)) read.input("d_errors", from.d_errors, to.d_errors);
  if ((to.errors.data || to.d_errors.data) && (call.reduction != Reduction::sum || call.result.data || call.means))
    read.refuse("errors", "are those of elements: they go with the reduction sum, without result and means");
  if (to.errors.data && to.gradient.data && !to.d_errors.data) read.refuse("d_errors", "is needed with a gradient beside errors");
  if (given(from.order)) to.order = parse_order(from.order, layout);
  to.layout = layout;
}

inline void fill(Reader& read, const GaussianOperands& from, GaussianCall& call) {
  GaussianArguments& to = call.kernel;
  const Layout& layout = read.layout;
  const bool learned = from.l_v != Py_None;
  // The network's output has the prediction and v of a sample one behind the other.
  const int64_t elements = learned ? 2 * layout.elements : layout.elements;
  if (learned && layout.elements && (layout.samples == 0 || layout.elements % layout.samples))
    read.refuse("layout", "the samples do not divide the elements");
  to.output = parse_input("output", from.output, elements);
  if (given(from.x0)) read.input("x0", from.x0, to.x0);
  if (given(from.n)) read.noise("n", from.n, to.n);
  if (from.p != Py_None) read.rows("p", from.p, to.p);
  if (from.q != Py_None) read.rows("q", from.q, to.q);
  read.rows("scale", from.scale, to.scale);
  read.rows("l_0", from.l_0, to.l_0);
  if (learned) read.rows("l_v", from.l_v, to.l_v);
  read.rows("l_q", from.l_q, to.l_q);
  if (from.half_width != Py_None) read.rows("half_width", from.half_width, to.half_width);
  read.rows("weight", from.weight, to.weight);
  if (from.simple_weight != Py_None) read.rows("simple_weight", from.simple_weight, to.simple_weight);
  if (from.upstream != Py_None) read.rows("upstream", from.upstream, call.upstream);
  if ((to.p.data || to.half_width.data) && !to.x0.data) read.refuse("x0", "is needed with p, and with half_width");
  if (!to.q.data != (to.n.kind == Noise::none)) read.refuse("n", "goes with q, both or neither");
  to.freeze_mean = parse_code("freeze_mean", from.freeze_mean, 2);
  call.reduction = Reduction(parse_code("reduction", from.reduction, 3));
  const bool reduced = call.reduction != Reduction::none;
  if (call.upstream.stride && layout.rows > 1 && reduced)
    read.refuse("upstream", "a reduced loss has one upstream gradient");
  optional_output("result", from.result, reduced ? 1 : layout.rows, call.result, read.compute());
  optional_output("gradient", from.gradient, elements, to.gradient);
  to.layout = layout;
}

// Moments have the means and the log-variances of a sample one behind the other.
inline Input parse_moments(Reader& read, PyObject* value) {
  const Layout& layout = read.layout;
  if (layout.elements && (layout.samples == 0 || layout.elements % layout.samples))
    read.refuse("layout", "the samples do not divide the elements");
  return parse_input("moments", value, 2 * layout.elements);
}

inline void fill(Reader& read, const PosteriorOperands& from, PosteriorArguments& to) {
  const int64_t elements = read.layout.elements;
  to.moments = parse_moments(read, from.moments);
  if (given(from.xi)) read.noise("xi", from.xi, to.xi);
  if (given(from.n)) read.noise("n", from.n, to.n);
  read.rows("scale", from.scale, to.scale);
  if (given(from.shift)) read.rows("shift", from.shift, to.shift);
  if (given(from.alpha)) read.rows("alpha", from.alpha, to.alpha);
  if (given(from.sigma)) read.rows("sigma", from.sigma, to.sigma);
  to.least = read.number("least", from.least);
  to.most = read.number("most", from.most);
  to.z = parse_output("z", from.z, elements);
  optional_output("x_t", from.x_t, elements, to.x_t);
  optional_output("keep", from.keep, elements, to.keep, read.compute());
  const bool noised = to.n.kind != Noise::none;
  if (noised != !!to.alpha.data || noised != !!to.sigma.data || noised != !!to.x_t.data)
    read.refuse("n", "goes with alpha, sigma and x_t, all or none");
  to.layout = read.layout;
}

inline void fill(Reader& read, const PosteriorGradientOperands& from, PosteriorGradientArguments& to) {
  to.moments = parse_moments(read, from.moments);
  if (given(from.xi)) read.noise("xi", from.xi, to.xi);
  read.rows("scale", from.scale, to.scale);
  if (given(from.alpha)) read.rows("alpha", from.alpha, to.alpha);
  to.least = read.number("least", from.least);
  to.most = read.number("most", from.most);
  if (given(from.d_z)) read.input("d_z", from.d_z, to.d_z);
  if (given(from.d_x_t)) read.input("d_x_t", from.d_x_t, to.d_x_t);
  if (to.d_x_t.data && !to.alpha.data) read.refuse("alpha", "is needed with d_x_t");
  to.gradient = parse_output("gradient", from.gradient, 2 * read.layout.elements);
  to.layout = read.layout;
}

inline void fill(Reader& read, const KLNormalOperands& from, KLNormalCall& call) {
  KLNormalArguments& to = call.kernel;
  to.moments = parse_moments(read, from.moments);
  read.rows("weight", from.weight, to.weight);
  to.least = read.number("least", from.least);
  to.most = read.number("most", from.most);
  call.reduction = Reduction(parse_code("reduction", from.reduction, 3));
  if (from.upstream != Py_None) read.rows("upstream", from.upstream, call.upstream);
  const bool reduced = call.reduction != Reduction::none;
  if (call.upstream.stride && read.layout.rows > 1 && reduced)
    read.refuse("upstream", "a reduced loss has one upstream gradient");
  optional_output("result", from.result, reduced ? 1 : read.layout.rows, call.result, read.compute());
  optional_output("gradient", from.gradient, 2 * read.layout.elements, to.gradient);
  to.layout = read.layout;
}

// What a tuple has for a moment.
template <class Reader>
PyObject* of_moment(Reader& read, const char* name, PyObject* tuple, int moment) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != kMoments) read.refuse(name, "expected a tuple of 8, one a moment");
  return PyTuple_GET_ITEM(tuple, moment);
}

template <class Reader>
void fill(Reader& read, const MomentsOperands& from, MomentsCall& call) {
  MomentsArguments& to = call.kernel;
  read.input("a", from.a, to.a);
  if (given(from.b)) read.input("b", from.b, to.b);
  read.known = true;
  read.wide = parse_code("dtype", from.dtype, 2) == int(DType::f64);
  for (int k = 0; k < kMoments; ++k)
    optional_output("results", of_moment(read, "results", from.results, k), read.layout.rows, call.results[k],
                    read.compute());
  to.layout = read.layout;
}

template <class Reader>
void fill(Reader& read, const MomentsGradientOperands& from, MomentsGradientArguments& to) {
  read.input("a", from.a, to.a);
  if (given(from.b)) read.input("b", from.b, to.b);
  for (int k = 0; k < kMoments; ++k) {
    PyObject* const rows = of_moment(read, "upstream", from.upstream, k);
    if (given(rows)) read.rows("upstream", rows, to.upstream[k]);
  }
  optional_output("d_a", from.d_a, read.layout.elements, to.d_a);
  optional_output("d_b", from.d_b, read.layout.elements, to.d_b);
  to.layout = read.layout;
}

template <class Reader>
void fill(Reader& read, const StepOperands& from, StepArguments& to) {
  const int64_t elements = read.layout.elements;
  read.input("x", from.x, to.x);
  read.input("m", from.m, to.m);
  if (given(from.uncond)) read.input("uncond", from.uncond, to.uncond);
  read.rows("table", from.table, to.table, kColumns);
  if (from.guidance != Py_None) read.rows("guidance", from.guidance, to.guidance);
  if (to.uncond.data && !to.guidance.data) read.refuse("guidance", "is needed with uncond");
  if (from.threshold != Py_None) read.rows("threshold", from.threshold, to.threshold);
  if (from.clip) to.clip = parse_clip(read, from.clip);
  const int entries = from.history ? count_history(read, from.history) : 0;
  for (int j = 0; from.history && j < kHistory; ++j) {
    to.history[j] = {nullptr, DType::f32};
    if (j < entries) read.input("history", PyTuple_GET_ITEM(from.history, j), to.history[j]);
  }
  if (given(from.noise)) read.noise("noise", from.noise, to.noise);
  if (given(from.log_variance)) read.input("log_variance", from.log_variance, to.log_variance);
  if (given(from.mask)) read.mask(from.mask, to.mask);
  if (given(from.known)) read.input("known", from.known, to.known);
  if (given(from.known_noise)) read.noise("known_noise", from.known_noise, to.known_noise);
  if (!to.mask.tensor.data != !to.known.data) read.refuse("known", "goes with mask, both or neither");
  if (from.y) to.y = parse_output("y", from.y, elements);
  optional_output("x0", from.x0, elements, to.x0);
  optional_output("entry", from.entry, elements, to.entry, read.compute());
  if (from.model_input) {
    to.copies = given(from.model_input) ? copies_in(from.model_input, elements) : 1;
    to.model_input = {nullptr, DType::f32, false};
    optional_output("model_input", from.model_input, to.copies * elements, to.model_input);
  }
  to.layout = read.layout;
}

template <class Arguments>
void run_unlocked(const Reader& read, Arguments& call, int threads) {
  const Unlocked unlocked(read.layout);
  run(call, read.wide, threads);
}

}  // namespace fastdiff
