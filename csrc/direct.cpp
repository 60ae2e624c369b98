#include "direct.h"

#include <cmath>
#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/run.h"
#include "fastcall.h"
#include "philox.h"
#include "tensors.h"
#include "unlocked.h"

namespace fastdiff {

namespace {

using tensors::View;

// Where rows of coefficients come from, by the times t of a batch. `table` has kind * width numbers:
//   gathered   table[t, k], t int64
//   rational   (table[0, k] + table[1, k] t) / (1 + table[2, k] t), t floating point in [low, high]
//   constant   table[0, k], whatever t is in [low, high]
struct Source {
  enum Kind { gathered, rational, constant } kind;
  int64_t height;
  int width;
  double low, high;
  std::vector<double> table;
};

constexpr const char* kSourceName = "fastdiff.rows";
constexpr int kMostColumns = 16;

// (kind, height, width, (pointer, float64, numbers), low, high): a capsule with a copy of the table.
py::capsule make_source(py::handle kind, py::handle height, py::handle width, py::handle table, py::handle low,
                        py::handle high) {
  auto source = std::make_unique<Source>();
  source->kind = Source::Kind(parse_code("kind", kind, 3));
  source->height = parse_integer("height", height);
  const int64_t columns = parse_integer("width", width);
  if (columns < 1 || columns > kMostColumns) throw py::value_error("width: must be from 1 to 16");
  source->width = int(columns);
  const int64_t least = source->kind == Source::rational ? 3 : 1;
  if (source->height < least || source->height > (int64_t(1) << 40) || (source->kind != Source::gathered && source->height != least))
    throw py::value_error("height: does not go with the kind");
  const Input numbers = parse_input("table", table, source->height * columns);
  if (numbers.dtype != DType::f64) throw py::value_error("table: must be float64");
  source->table.assign((const double*)numbers.data, (const double*)numbers.data + source->height * columns);
  source->low = parse_number("low", low);
  source->high = parse_number("high", high);
  return py::capsule(source.release(), kSourceName, [](void* made) { delete (Source*)made; });
}

const Source* source_of(PyObject* capsule, int width) {
  if (!PyCapsule_IsValid(capsule, kSourceName)) throw py::type_error("expected rows made by row_source");
  const auto* source = (const Source*)PyCapsule_GetPointer(capsule, kSourceName);
  if (source->width != width) throw py::value_error("rows: has another number of columns");
  return source;
}

// The rows of a batch in the compute dtype, one column behind the other.
class BatchRows {
 public:
  // False: t is not one plain time a sample, or out of range.
  bool find(const Source& source, PyObject* times, int64_t batch, bool wide) {
    wide_ = wide;
    stride_ = source.kind == Source::constant ? 0 : 1;
    count_ = stride_ ? batch : 1;
    if (source.width * count_ > kInside) {
      more_.reset(new double[size_t(source.width * count_)]);
      numbers_ = more_.get();
    }
    View t;
    if (!tensors::view(times, t) || t.dims != 1 || t.elements != batch) return false;
    const double* table = source.table.data();
    if (source.kind == Source::gathered) {
      if (t.dtype != tensors::kIndex) return false;
      const auto* index = (const int64_t*)t.data;
      for (int64_t r = 0; r < batch; ++r)
        if (index[r] < 0 || index[r] >= source.height) return false;
      for (int64_t r = 0; r < batch; ++r)
        for (int k = 0; k < source.width; ++k) put(k, r, table[index[r] * source.width + k]);
      return true;
    }
    if (t.dtype != int(DType::f32) && t.dtype != int(DType::f64)) return false;
    if (tensors::differentiable(times)) return false;
    for (int64_t r = 0; r < batch; ++r) {
      const double time = t.dtype == int(DType::f64) ? ((const double*)t.data)[r] : double(((const float*)t.data)[r]);
      if (!(time >= source.low && time <= source.high && time < HUGE_VAL)) return false;
      if (source.kind == Source::constant) continue;
      for (int k = 0; k < source.width; ++k)
        put(k, r, (table[k] + table[source.width + k] * time) / (1 + table[2 * source.width + k] * time));
    }
    if (source.kind == Source::constant)
      for (int k = 0; k < source.width; ++k) put(k, 0, table[k]);
    return true;
  }

  Rows column(int k) const {
    const int64_t size = wide_ ? 8 : 4;
    return {(const char*)numbers_ + k * count_ * size, stride_};
  }

 private:
  void put(int column, int64_t row, double value) {
    if (wide_)
      numbers_[column * count_ + row] = value;
    else
      ((float*)numbers_)[column * count_ + row] = float(value);
  }

  static constexpr int64_t kInside = 256;
  double inside_[kInside];
  std::unique_ptr<double[]> more_;
  double* numbers_ = inside_;
  int64_t count_;
  int stride_;
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

// noise(rows, x0, t, n, kept, threads) -> x_t, or None.
// rows: (alpha, sigma). n: a tensor, or as parse_noise takes it. kept: where to write the noise that is made; or None.
py::object noise(PyObject* const* a) {
  const Source& source = *source_of(a[0], 2);
  View x0, x_t, kept;
  if (!tensors::view(a[1], x0) || !x0.floating() || x0.dims < 1 || tensors::differentiable(a[1])) return py::none();
  NoiseArguments call{};
  call.layout = layout_of(x0);
  bool wide = is_wide(x0);
  BatchRows rows;
  if (!find_noise(a[3], x0, call.layout, call.n, wide)) return py::none();
  if (!rows.find(source, a[2], x0.sizes[0], wide) || tensors::transformed()) return py::none();
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

// loss(rows, present, function, prediction, x0, n, t, scalar, gradient, threads) -> (mean loss, gradient or None), or
// None. rows: (p, q, scale, weight, c), those that the bits of `present` name are used; x0 goes with p, n with q.
// scalar: a tensor of one number in the compute dtype, to make the result like.
py::object loss(PyObject* const* a) {
  const Source& source = *source_of(a[0], 5);
  const int64_t present = parse_integer("present", a[1]);
  View prediction;
  if (!tensors::view(a[3], prediction) || !prediction.floating() || prediction.dims < 1) return py::none();
  LossCall call{};
  LossArguments& kernel = call.kernel;
  kernel.prediction = prediction.input();
  kernel.layout = layout_of(prediction);
  kernel.function = Function(parse_code("function", a[2], 5));
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
  if (!rows.find(source, a[6], prediction.sizes[0], wide) || tensors::transformed()) return py::none();
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

// convert(rows, m, x_t, t, threads) -> k_x x_t + k_m m, or None. rows: (k_x, k_m).
py::object convert(PyObject* const* a) {
  const Source& source = *source_of(a[0], 2);
  View m, x_t, out;
  if (!tensors::view(a[1], m) || !m.floating() || m.dims < 1 || tensors::differentiable(a[1])) return py::none();
  if (!tensors::view(a[2], x_t) || !x_t.floating() || !tensors::same_shape(x_t, m) || tensors::differentiable(a[2]))
    return py::none();
  const bool wide = is_wide(m) || is_wide(x_t);
  BatchRows rows;
  if (!rows.find(source, a[3], m.sizes[0], wide) || tensors::transformed()) return py::none();
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

// times(out, seed, stream, sample_offset, steps) -> out, or None. A uniform u in (0, 1) a sample into a float64 tensor
// (steps 0), or the index floor(steps u) into one of int64.
py::object times(PyObject* const* a) {
  View out;
  if (!tensors::view(a[0], out) || tensors::transformed()) return py::none();
  const int64_t steps = parse_integer("steps", a[4]), stream = parse_integer("stream", a[2]);
  if (out.dtype != (steps ? tensors::kIndex : int(DType::f64)) || stream < 0 || stream > UINT32_MAX || steps < 0)
    return py::none();
  const uint64_t seed = parse_seed(a[1]), first = uint64_t(parse_integer("sample_offset", a[3]));
  for (int64_t k = 0; k < out.elements; ++k) {
    const double u = philox::uniform(philox::words(seed, 0, uint32_t(stream), first + uint64_t(k)));
    if (steps) {
      const int64_t index = int64_t(u * double(steps));
      ((int64_t*)out.data)[k] = index < steps ? index : steps - 1;
    } else {
      ((double*)out.data)[k] = u;
    }
  }
  return py::reinterpret_borrow<py::object>(a[0]);
}

template <py::object (*function)(PyObject* const*)>
py::object plain(PyObject* const* arguments) {
  try {
    return tensors::enabled() ? function(arguments) : py::none();
  } catch (const NotPlain&) {
    return py::none();
  }
}

PyMethodDef methods[] = {fast_method<plain<noise>, 6>("direct_noise"),
                         fast_method<plain<loss>, 10>("direct_loss"),
                         fast_method<plain<convert>, 5>("direct_convert"),
                         fast_method<plain<step>, 7>("direct_step"),
                         fast_method<plain<times>, 5>("direct_times"),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_direct(py::module_& module) {
  module.def("row_source", make_source);
  module.def("enable_tensors", tensors::enable);
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastdiff
