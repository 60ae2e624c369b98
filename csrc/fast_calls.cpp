#include "fast_calls.h"

#include <cmath>
#include <memory>

#include "checks.h"
#include "coefficients.h"
#include "cpu/run.h"
#include "fastcall.h"
#include "philox.h"
#include "tensors.h"
#include "unlocked.h"

namespace fastdiff {

namespace {

using tensors::View;

// What a program computes for each sample of a batch, in the compute dtype, one column behind the other.
class BatchRows {
 public:
  // False: t is not one plain time a sample, or out of range.
  bool find(const Program& program, PyObject* times, int64_t batch, bool wide) {
    wide_ = wide;
    count_ = batch;
    View t;
    if (!tensors::view(times, t) || t.dims != 1 || t.elements != batch) return false;
    if (program.index != (t.dtype == tensors::kIndex)) return false;
    if (!program.index && t.dtype != int(DType::f32) && t.dtype != int(DType::f64)) return false;
    if (!program.index && tensors::differentiable(times)) return false;
    columns_ = int64_t(program.outputs.size());
    double* inputs = inside_;
    if ((columns_ + 1) * batch > kInside) {
      more_.reset(new double[size_t((columns_ + 1) * batch)]);
      inputs = more_.get();
    }
    numbers_ = inputs + batch;
    for (int64_t r = 0; r < batch; ++r) {
      inputs[r] = program.index              ? double(((const int64_t*)t.data)[r])
                  : t.dtype == int(DType::f64) ? ((const double*)t.data)[r]
                                               : double(((const float*)t.data)[r]);
      if (!program.allows(inputs[r])) return false;
    }
    evaluate(program, inputs, batch, wide, numbers_);
    return true;
  }

  Rows column(int k) const {
    const int64_t size = wide_ ? 8 : 4;
    return {(const char*)numbers_ + k * count_ * size, 1};
  }

  bool finite() const {
    for (int64_t k = 0; k < columns_ * count_; ++k)
      if (!std::isfinite(wide_ ? numbers_[k] : double(((const float*)numbers_)[k]))) return false;
    return true;
  }

 private:
  static constexpr int64_t kInside = 256;
  double inside_[kInside];
  std::unique_ptr<double[]> more_;
  double* numbers_;
  int64_t count_, columns_;
  bool wide_;
};

// One row a sample.
Layout layout_of(const View& data) {
  const int64_t batch = data.sizes[0];
  return {batch, 1, 1, data.elements / batch, batch, data.dims > 1 ? data.sizes[1] : 1, batch, data.elements};
}

bool is_wide(const View& data) { return data.dtype == int(DType::f64); }

int code(bool wide) { return int(wide ? DType::f64 : DType::f32); }

// A tensor shaped as `like`, or what parse_noise takes to make one. False: it is not plain.
bool find_noise(PyObject* n, const View& like, const Layout& layout, Noise& noise, bool& wide) {
  if (PyTuple_Check(n)) {
    noise = parse_noise("noise", n, layout);
    return noise.kind == Noise::made;
  }
  View given;
  if (!tensors::view(n, given) || !given.floating() || !tensors::same_shape(given, like)) return false;
  if (tensors::differentiable(n)) return false;
  noise.kind = Noise::given;
  noise.tensor = given.input();
  wide |= is_wide(given);
  return true;
}

struct NotPlain {};

// A new tensor like one, and its view. Throws NotPlain where a mode of PyTorch makes another kind.
py::object make_like(PyObject* tensor, View& view) {
  py::object made = py::reinterpret_steal<py::object>(tensors::empty_like(tensor));
  if (!made) throw py::error_already_set();
  if (!tensors::view(made.ptr(), view)) throw NotPlain();
  return made;
}

// noise(program, x0, t, n, kept, threads) -> x_t, or None.
// program: of (alpha, sigma). n: a tensor, or as parse_noise takes it. kept: where to write the noise that is made; or None.
py::object noise(PyObject* const* a) {
  const Program& program = program_of(a[0], 2);
  View x0, x_t, kept;
  if (!tensors::view(a[1], x0) || !x0.floating() || x0.dims < 1 || tensors::differentiable(a[1])) return py::none();
  NoiseArguments call{};
  call.layout = layout_of(x0);
  bool wide = is_wide(x0);
  BatchRows rows;
  if (!find_noise(a[3], x0, call.layout, call.n, wide)) return py::none();
  if (!rows.find(program, a[2], x0.sizes[0], wide) || tensors::transformed()) return py::none();
  call.alpha = rows.column(0);
  call.sigma = rows.column(1);
  call.x0 = x0.input();
  const int threads = parse_threads(a[5]);
  if (a[4] != Py_None) {
    if (!tensors::view(a[4], kept) || kept.dtype != code(wide) || kept.elements != x0.elements) return py::none();
    call.keep = kept.output();
  }
  py::object result = make_like(a[1], x_t);
  call.x_t = x_t.output();
  {
    const Unlocked unlocked(call.layout);
    run(call, wide, threads);
  }
  return result;
}

// loss(program, present, function, prediction, x0, n, t, scalar, gradient, threads) -> (mean loss, gradient or None), or
// None. program: of (p, q, scale, weight, c), of which those that the bits of `present` name are used; x0 goes with p, n with q.
// scalar: a tensor of one number in the compute dtype, to make the result like.
py::object loss(PyObject* const* a) {
  const Program& program = program_of(a[0], 5);
  const int64_t present = parse_integer("present", a[1]);
  View prediction;
  if (!tensors::view(a[3], prediction) || !prediction.floating() || prediction.dims < 1) return py::none();
  LossCall call{};
  LossArguments& kernel = call.kernel;
  kernel.prediction = prediction.input();
  kernel.layout = layout_of(prediction);
  kernel.function = Function(parse_code("function", a[2], kFunctions));
  bool wide = is_wide(prediction);
  const bool has_p = present & 1, has_q = present & 2;
  if (has_p) {
    View x0;
    if (!tensors::view(a[4], x0) || !x0.floating() || !tensors::same_shape(x0, prediction)) return py::none();
    if (tensors::differentiable(a[4])) return py::none();
    kernel.x0 = x0.input();
    wide |= is_wide(x0);
  }
  if (has_q && !find_noise(a[5], prediction, kernel.layout, kernel.n, wide)) return py::none();
  BatchRows rows;
  if (!rows.find(program, a[6], prediction.sizes[0], wide) || tensors::transformed()) return py::none();
  if (has_p) kernel.p = rows.column(0);
  if (has_q) kernel.q = rows.column(1);
  if (present & 4) kernel.scale = rows.column(2);
  kernel.weight = rows.column(3);
  if (present & 16) kernel.c = rows.column(4);
  if (needs_c(kernel.function) && !kernel.c.data)
    throw py::value_error("c: this error function needs its constant");
  call.reduction = Reduction::mean;
  const int threads = parse_threads(a[9]);
  View result, gradient;
  py::object value = make_like(a[7], result), slope = py::none();
  if (result.dtype != code(wide) || result.elements != 1) return py::none();
  call.result = result.output();
  if (a[8] == Py_True) {
    slope = make_like(a[3], gradient);
    kernel.gradient = gradient.output();
  }
  {
    const Unlocked unlocked(kernel.layout);
    run(call, wide, threads);
  }
  return py::make_tuple(value, slope);
}

// convert(program, m, x_t, t, threads) -> k_x x_t + k_m m, or None. program: of (k_x, k_m); None where one is not finite.
py::object convert(PyObject* const* a) {
  const Program& program = program_of(a[0], 2);
  View m, x_t, out;
  if (!tensors::view(a[1], m) || !m.floating() || m.dims < 1 || tensors::differentiable(a[1])) return py::none();
  if (!tensors::view(a[2], x_t) || !x_t.floating() || !tensors::same_shape(x_t, m) || tensors::differentiable(a[2]))
    return py::none();
  const bool wide = is_wide(m) || is_wide(x_t);
  BatchRows rows;
  if (!rows.find(program, a[3], m.sizes[0], wide) || !rows.finite() || tensors::transformed()) return py::none();
  ConvertArguments call{};
  call.layout = layout_of(m);
  call.m = m.input();
  call.x_t = x_t.input();
  call.k_x = rows.column(0);
  call.k_m = rows.column(1);
  const int threads = parse_threads(a[4]);
  py::object result = make_like(a[1], out);
  call.out = out.output();
  {
    const Unlocked unlocked(call.layout);
    run(call, wide, threads);
  }
  return result;
}

// step(x, m, row, clip, noise, x0, threads) -> (y, x0 estimate or None), or None.
// row: kColumns numbers for the whole batch. clip: a bound or None. noise: as parse_noise takes it, a tensor, or None.
// x0: whether the estimate is wanted.
py::object step(PyObject* const* a) {
  View x, m, row;
  if (!tensors::view(a[0], x) || !x.floating() || x.dims < 1 || tensors::differentiable(a[0])) return py::none();
  if (!tensors::view(a[1], m) || !m.floating() || !tensors::same_shape(m, x) || tensors::differentiable(a[1]))
    return py::none();
  if (!tensors::view(a[2], row) || row.elements != kColumns || row.dims != 1 || tensors::differentiable(a[2]))
    return py::none();
  StepArguments call{};
  call.layout = layout_of(x);
  call.layout.rows = 1;
  call.layout.outer = 1;
  call.layout.inner = x.elements;
  bool wide = is_wide(x) || is_wide(m), noise_wide = false;
  if (row.dtype != code(wide)) return py::none();
  if (a[4] != Py_None && !find_noise(a[4], x, call.layout, call.noise, noise_wide)) return py::none();
  call.clip = -1;
  if (a[3] != Py_None) {
    if (!PyFloat_Check(a[3]) && !PyLong_Check(a[3])) return py::none();
    call.clip = parse_number("clip", a[3]);
    if (!(call.clip > 0)) return py::none();
  }
  if (tensors::transformed()) return py::none();
  call.table = {row.data, 0};
  call.x = x.input();
  call.m = m.input();
  call.copies = 1;
  const int threads = parse_threads(a[6]);
  View y, estimate;
  py::object result = make_like(a[0], y), x0 = py::none();
  call.y = y.output();
  if (a[5] == Py_True) {
    x0 = make_like(a[0], estimate);
    call.x0 = estimate.output();
  }
  {
    const Unlocked unlocked(call.layout);
    run(call, wide, threads);
  }
  return py::make_tuple(result, x0);
}

// times(program, out, seed, stream, sample_offset) -> out, or None. What the program makes of a uniform u in (0, 1) a
// sample: into a tensor of float64 or, for a time that is an index, of int64.
py::object times(PyObject* const* a) {
  const Program& program = program_of(a[0], 1);
  View out;
  if (!tensors::view(a[1], out) || tensors::transformed()) return py::none();
  const int64_t stream = parse_integer("stream", a[3]);
  if ((out.dtype != tensors::kIndex && out.dtype != int(DType::f64)) || stream < 0 || stream > UINT32_MAX || program.index)
    return py::none();
  draw(program, parse_seed(a[2]), uint32_t(stream), uint64_t(parse_integer("sample_offset", a[4])), out.elements,
       out.dtype == tensors::kIndex, out.data);
  return py::reinterpret_borrow<py::object>(a[1]);
}

template <py::object (*function)(PyObject* const*)>
py::object plain(PyObject* const* arguments) {
  try {
    return tensors::enabled() ? function(arguments) : py::none();
  } catch (const NotPlain&) {
    return py::none();
  }
}

PyMethodDef methods[] = {fast_method<plain<noise>, 6>("fast_noise"),
                         fast_method<plain<loss>, 10>("fast_loss"),
                         fast_method<plain<convert>, 5>("fast_convert"),
                         fast_method<plain<step>, 7>("fast_step"),
                         fast_method<plain<times>, 5>("fast_times"),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_fast_calls(py::module_& module) {
  module.def("enable_tensors", tensors::enable);
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastdiff
