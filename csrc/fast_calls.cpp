#include "fast_calls.h"

#include <cmath>
#include <memory>

#include "coefficients.h"
#include "fastcall.h"
#include "operations.h"
#include "tensors.h"

namespace fastdiff {

namespace {

using tensors::View;

enum Present { kP = 1, kQ = 2, kWeight = 8 };  // of the outputs of a loss's program, by bits

// Its coefficients are what a program computes from one time a sample, in the order of the program's outputs.
class BatchReader : public tensors::Reader {
 public:
  // `present`: by bits, which outputs are coefficients of this call.
  BatchReader(PyObject* first, const Program& program, PyObject* times, int64_t present = -1, bool recorded = false,
              bool image = false, PyObject* starts = nullptr)
      : Reader(first, recorded, false, image, starts), program_(program), times_(times), present_(present) {}

  void rows(const char*, py::handle, Rows& to) {
    if (!known) fits = fits && compute_columns();
    known = true;
    const int64_t k = next_++, size = wide ? 8 : 4;
    if (fits && k < columns_ && present_ >> k & 1) to = {(const char*)numbers_ + k * layout.rows * size, 1};
  }

  // Multiplies a coefficient by numbers in the compute dtype: one, or one a sample.
  void multiply(const Rows& rows, PyObject* by) {
    if (!fits || by == Py_None) return;
    View given;
    fits = tensors::view(by, given) && given.dtype == int(compute()) && !tensors::differentiable(by);
    const bool single = fits && given.elements == 1, whole = fits && (given.dims == 1 || given.dims == first_.dims);
    fits = single || (whole && given.elements == layout.rows && given.sizes[0] == layout.rows);
    for (int64_t r = 0; fits && r < layout.rows; ++r) {
      const int64_t k = single ? 0 : r;
      if (wide)
        ((double*)rows.data)[r] *= ((const double*)given.data)[k];
      else
        ((float*)rows.data)[r] *= ((const float*)given.data)[k];
    }
  }

  bool finite() const {
    for (int64_t k = 0; fits && k < columns_ * layout.rows; ++k)
      if (!std::isfinite(wide ? numbers_[k] : double(((const float*)numbers_)[k]))) return false;
    return fits;
  }

 private:
  // False: t is not one plain time a sample, or out of range.
  bool compute_columns() {
    const int64_t batch = layout.rows;
    View t;
    if (!tensors::view(times_, t) || t.dims != 1 || t.elements != batch) return false;
    if (program_.index != (t.dtype == tensors::kIndex)) return false;
    if (!program_.index && t.dtype != int(DType::f32) && t.dtype != int(DType::f64)) return false;
    if (!program_.index && tensors::differentiable(times_)) return false;
    columns_ = int64_t(program_.outputs.size());
    double* inputs = inside_;
    if ((columns_ + 1) * batch > kInside) {
      more_.reset(new double[size_t((columns_ + 1) * batch)]);
      inputs = more_.get();
    }
    numbers_ = inputs + batch;
    for (int64_t r = 0; r < batch; ++r) {
      inputs[r] = program_.index             ? double(((const int64_t*)t.data)[r])
                  : t.dtype == int(DType::f64) ? ((const double*)t.data)[r]
                                               : double(((const float*)t.data)[r]);
      if (!program_.allows(inputs[r])) return false;
    }
    evaluate(program_, inputs, batch, wide, numbers_);
    return true;
  }

  static constexpr int64_t kInside = 256;
  const Program& program_;
  PyObject* times_;
  int64_t present_, columns_, next_ = 0;
  double inside_[kInside];
  std::unique_ptr<double[]> more_;
  double* numbers_;
};

// A result like an operand of the same dtype.
py::object make_like(const Reader& read, PyObject* operand, DType dtype, Output& to) {
  return tensors::make_like(operand, dtype, dtype, read.layout.elements, to);
}

// noise(program, x0, t, n, keep, dtype, threads, starts) -> (x_t, the noise that was made or None), or None.
// program: of (alpha, sigma). x0: may be an image. n: a tensor, or as parse_noise takes it. keep: whether noise that is
// made is returned. dtype: the code of that of x_t; or None for that of x0, which then is no image. starts: of packed
// sequences, or None.
py::object noise(PyObject* const* a) {
  BatchReader read(a[1], program_of(a[0], 2), a[2], -1, false, a[5] != Py_None, a[7]);
  NoiseOperands from{};
  from.x0 = a[1];
  from.n = a[3];
  NoiseArguments call{};
  fill(read, from, call);
  if (!read.fits || tensors::transformed()) return py::none();
  const int threads = parse_threads(a[6]);
  const DType dtype = a[5] == Py_None ? call.x0.dtype : DType(parse_code("dtype", a[5], int(DType::u8)));
  const int64_t elements = read.layout.elements;
  py::object result = tensors::make_like(a[1], call.x0.dtype, dtype, elements, call.x_t), kept = py::none();
  if (a[4] == Py_True && call.n.kind == Noise::made)
    kept = tensors::make_like(a[1], call.x0.dtype, read.compute(), elements, call.keep);
  run_unlocked(read, call, threads);
  return py::make_tuple(std::move(result), std::move(kept));
}

// loss(program, present, function, prediction, x0, n, t, scalar, gradient, threads, mask, normalization, reduction, weight,
// upstream, starts) -> (loss, gradient or None), or None. program: of (p, q, scale, weight, c), of which those that the bits of
// `present` name are used; x0 goes with p, n with q. scalar: a tensor of one number in the compute dtype, to make a reduced
// loss like; or None for a gradient alone: then the loss is None. weight: numbers in the compute dtype, one or one a
// sample, that the program's weight is multiplied by; or None. upstream: the gradient of the loss, in the compute dtype;
// None: 1. starts: of packed sequences, or None.
py::object loss(PyObject* const* a) {
  const int64_t present = parse_integer("present", a[1]);
  BatchReader read(a[3], program_of(a[0], 5), a[6], present | kWeight, true, false, a[15]);
  LossOperands from{};
  from.prediction = a[3];
  if (present & kP) from.x0 = a[4];
  if (present & kQ) from.n = a[5];
  from.function = a[2];
  from.mask = a[10];
  from.normalization = a[11];
  from.reduction = a[12];
  LossCall call{};
  fill(read, from, call);
  read.multiply(call.kernel.weight, a[13]);
  if (!read.fits || tensors::transformed()) return py::none();
  const int threads = parse_threads(a[9]);
  const DType dtype = read.compute();
  const bool by_row = call.reduction == Reduction::none;
  const int64_t results = by_row ? read.layout.rows : 1;
  py::object value = py::none(), slope = py::none();
  if (View upstream; a[14] != Py_None) {
    if (!tensors::view(a[14], upstream) || upstream.dtype != int(dtype) || upstream.elements != results) return py::none();
    call.upstream = {upstream.data, results > 1};
  }
  if (a[7] != Py_None) {  // rows are like t, whatever its dtype
    value = by_row ? tensors::make_like(a[6], DType::u8, dtype, results, call.result)
                   : tensors::make_like(a[7], dtype, dtype, results, call.result);
  }
  if (a[8] == Py_True) slope = make_like(read, a[3], call.kernel.prediction.dtype, call.kernel.gradient);
  run_unlocked(read, call, threads);
  return py::make_tuple(value, slope);
}

// convert(program, m, x_t, t, threads) -> k_x x_t + k_m m, or None. program: of (k_x, k_m); None where one is not finite.
py::object convert(PyObject* const* a) {
  BatchReader read(a[1], program_of(a[0], 2), a[3]);
  ConvertOperands from{};
  from.m = a[1];
  from.x_t = a[2];
  ConvertArguments call{};
  fill(read, from, call);
  if (!read.finite() || tensors::transformed()) return py::none();
  const int threads = parse_threads(a[4]);
  py::object result = make_like(read, a[1], call.m.dtype, call.out);
  run_unlocked(read, call, threads);
  return result;
}

// step(x, m, row, clip, noise, x0, threads) -> (y, x0 estimate or None), or None.
// row: kColumns numbers for the whole batch. clip: a bound or None. noise: as parse_noise takes it, a tensor, or None.
// x0: whether the estimate is wanted.
py::object step(PyObject* const* a) {
  tensors::Reader read(a[0]);
  read.layout.rows = read.layout.outer = 1;
  read.layout.inner = read.layout.elements;
  StepOperands from{};
  from.x = a[0];
  from.m = a[1];
  from.table = a[2];
  from.clip = a[3];
  from.noise = a[4];
  StepArguments call{};
  fill(read, from, call);
  if (!read.fits || tensors::transformed()) return py::none();
  const int threads = parse_threads(a[6]);
  py::object result = make_like(read, a[0], call.x.dtype, call.y), x0 = py::none();
  if (a[5] == Py_True) x0 = make_like(read, a[0], call.x.dtype, call.x0);
  run_unlocked(read, call, threads);
  return py::make_tuple(result, x0);
}

// times(program, out, seed, stream, samples) -> out, or None. What the program makes of a uniform u in (0, 1) a
// sample: into a tensor of float64 or, for a time that is an index, of int64.
py::object times(PyObject* const* a) {
  const Program& program = program_of(a[0], 1);
  View out;
  if (!tensors::view(a[1], out) || tensors::transformed()) return py::none();
  if ((out.dtype != tensors::kIndex && out.dtype != int(DType::f64)) || program.index) return py::none();
  const Uniforms uniforms = parse_uniforms(a[2], a[3], a[4], out.elements, out.elements);
  draw(program, uniforms, out.dtype == tensors::kIndex, out.data);
  return py::reinterpret_borrow<py::object>(a[1]);
}

using tensors::fast_call;

PyMethodDef methods[] = {fast_method<fast_call<noise>, 8>("fast_noise"),
                         fast_method<fast_call<loss>, 16>("fast_loss"),
                         fast_method<fast_call<convert>, 5>("fast_convert"),
                         fast_method<fast_call<step>, 7>("fast_step"),
                         fast_method<fast_call<times>, 5>("fast_times"),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_fast_calls(py::module_& module) {
  module.def("enable_tensors", tensors::enable);
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastdiff
