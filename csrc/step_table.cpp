#include "step_table.h"

#include <memory>
#include <vector>

#include "checks.h"
#include "cpu/run.h"
#include "cpu/torch_state.h"
#include "fastcall.h"
#include "tensors.h"
#include "unlocked.h"

namespace fastdiff {

namespace {

using tensors::View;

// What PyTorch has and we need, held as long as the process lives.
struct {
  PyObject *generator_type, *default_generator, *thread_count, *empty_like;
  PyObject* dtypes[4];        // by DType
  PyObject *get_state, *set_state, *data_ptr, *numel, *dtype_names;
  bool known, allowed;  // known: these are set; allowed: CPU tensors are the native backend's
  int draws;            // what torch.randn need not draw: 1 float32, 2 bfloat16 and float16 too
} torch;

void enable(py::object generator_type, py::object default_generator, py::function thread_count, py::function empty_like,
            py::tuple dtypes) {
  if (py::len(dtypes) != 4) throw py::value_error("dtypes: expected four");
  torch.generator_type = generator_type.release().ptr();
  torch.default_generator = default_generator.release().ptr();
  torch.thread_count = thread_count.release().ptr();
  torch.empty_like = empty_like.release().ptr();
  for (int k = 0; k < 4; ++k) torch.dtypes[k] = py::object(dtypes[size_t(k)]).release().ptr();
  torch.get_state = PyUnicode_InternFromString("get_state");
  torch.set_state = PyUnicode_InternFromString("set_state");
  torch.data_ptr = PyUnicode_InternFromString("data_ptr");
  torch.numel = PyUnicode_InternFromString("numel");
  torch.dtype_names = py::make_tuple("dtype").release().ptr();
  torch.known = torch.allowed = true;
}

void allow(bool allowed) { torch.allowed = allowed; }
void allow_draws(int draws) { torch.draws = draws; }

py::object owned(PyObject* made) {
  if (!made) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(made);
}

// Few elements are done by the calling thread (run.cpp), and nobody has to be asked.
int threads_for(int64_t elements) {
  if (elements < 32768) return 1;
  return int(parse_integer("threads", owned(PyObject_CallNoArgs(torch.thread_count))));
}

// A new tensor of a dtype, shaped as one that is contiguous.
py::object make(PyObject* like, int has, int dtype, View& view) {
  PyObject* const arguments[] = {like, torch.dtypes[dtype]};
  py::object made = owned(has == dtype ? PyObject_CallOneArg(torch.empty_like, like)
                                       : PyObject_Vectorcall(torch.empty_like, arguments, 1, torch.dtype_names));
  if (!tensors::view(made.ptr(), view) || view.dtype != dtype) throw std::runtime_error("empty_like: no plain tensor");
  return made;
}

// The state of PyTorch's generator while numbers are drawn from it. Python's lock is held as long, so that no other
// Python thread draws the same numbers.
class Generator {
 public:
  // `generator`: a torch.Generator, None for the default one, a list of a single one. False for anything else.
  bool open(PyObject* generator, int64_t count, int dtype) {
    if (PyList_Check(generator) && PyList_GET_SIZE(generator) == 1) generator = PyList_GET_ITEM(generator, 0);
    generator_ = generator == Py_None ? torch.default_generator : generator;
    if (dtype == int(DType::f64) || torch.draws < (dtype == int(DType::f32) ? 1 : 2)) return false;
    if ((PyObject*)Py_TYPE(generator_) != torch.generator_type) return false;
    state_ = owned(PyObject_CallMethodNoArgs(generator_, torch.get_state));
    const int64_t bytes = parse_integer("state", owned(PyObject_CallMethodNoArgs(state_.ptr(), torch.numel)));
    void* data = (void*)parse_seed(owned(PyObject_CallMethodNoArgs(state_.ptr(), torch.data_ptr)));
    return draw_.open(data, bytes, count, DType(dtype));
  }
  TorchNormalArguments& arguments() { return draw_.arguments(); }
  void close() {
    draw_.close();
    owned(PyObject_CallMethodOneArg(generator_, torch.set_state, state_.ptr()));
  }

 private:
  PyObject* generator_ = nullptr;
  py::object state_;
  TorchDraw draw_;
};

// As torch.randn on a generator. False, and nothing drawn, where its state is not as expected.
bool torch_normal(py::handle generator, py::handle out, py::handle threads) {
  const Memory to = parse_memory("out", out);
  if (to.code == int(DType::f64) || to.code > int(DType::f16))
    throw py::value_error("out: must be float32, bfloat16 or float16");
  const int team = parse_threads(threads);
  const int before = torch.draws;
  torch.draws = torch.known ? 2 : 0;  // what is asked for by name is done, also to find out whether it may be
  Generator drawn;
  const bool open = drawn.open(generator.ptr(), to.elements, to.code);
  torch.draws = before;
  if (!open) return false;
  drawn.arguments().out = to.data;
  run(drawn.arguments(), team);
  drawn.close();
  return true;
}

// A float64 table as float32.
struct Table {
  int64_t rows;
  int width;
  std::vector<float> numbers;
};

constexpr const char* kTableName = "fastdiff.table";

py::capsule coefficient_table(py::handle rows, py::handle width, py::handle numbers) {
  auto table = std::make_unique<Table>();
  table->rows = parse_integer("rows", rows);
  const int64_t columns = parse_integer("width", width);
  if (columns < 1 || columns > 64 || table->rows < 1 || table->rows > (int64_t(1) << 32))
    throw py::value_error("table: too large, or empty");
  table->width = int(columns);
  const Input given = parse_input("numbers", numbers, table->rows * columns);
  if (given.dtype != DType::f64) throw py::value_error("numbers: must be float64");
  table->numbers.assign((const double*)given.data, (const double*)given.data + table->rows * columns);
  return py::capsule(table.release(), kTableName, [](void* made) { delete (Table*)made; });
}

const Table& table_of(PyObject* capsule, int width) {
  if (!PyCapsule_IsValid(capsule, kTableName)) throw py::type_error("expected what coefficient_table made");
  const auto* table = (const Table*)PyCapsule_GetPointer(capsule, kTableName);
  if (table->width != width) throw py::value_error("table: has another number of columns");
  return *table;
}

// A tensor to compute on in float32, with no gradient to record.
bool plain(PyObject* tensor, View& view) {
  return tensors::view(tensor, view) && view.floating() && view.dtype != int(DType::f64) && !tensors::differentiable(tensor);
}

bool plain_like(PyObject* tensor, const View& like, View& view) {
  return plain(tensor, view) && tensors::same_shape(view, like);
}

bool ready() { return torch.allowed && tensors::enabled() && !tensors::transformed(); }

enum Flags { kX0 = 1, kEntry = 2, kLikeModel = 4, kSame = 8, kDraw = 16, kDrawFloat = 32 };

// table_step(table, k, x, m, clip, history, noise, log_variance, flags) -> (y, x0 or None, entry or None), or None.
//   noise   a tensor or None; with kDraw a generator, None, or a list of one, to draw from as torch.randn does: in the
//           dtype of m, or with kDrawFloat in float32
//   flags   those of fastdiff/ops/step_table.py
py::object row(PyObject* const* a) {
  const Table& table = table_of(a[0], kColumns);
  View x, m, other;
  const int64_t k = parse_integer("k", a[1]), flags = parse_integer("flags", a[8]);
  if (k < 0 || k >= table.rows || !plain(a[2], x) || !plain_like(a[3], x, m)) return py::none();
  if ((flags & kSame) && x.dtype != m.dtype) return py::none();
  StepArguments call{};
  call.table = {table.numbers.data() + k * kColumns, 0};
  call.layout = {1, 1, 1, x.elements, 1, 1, 1, x.elements};
  call.x = x.input();
  call.m = m.input();
  call.copies = 1;
  call.clip = -1;
  if (a[4] != Py_None) {
    call.clip = parse_number("clip", a[4]);
    if (!(call.clip > 0)) return py::none();
  }
  const Py_ssize_t entries = PyTuple_Check(a[5]) ? PyTuple_GET_SIZE(a[5]) : kHistory + 1;
  if (entries > kHistory) return py::none();
  for (Py_ssize_t j = 0; j < entries; ++j) {
    if (!plain_like(PyTuple_GET_ITEM(a[5], j), x, other)) return py::none();
    call.history[j] = other.input();
  }
  if (a[7] != Py_None) {
    if (!plain_like(a[7], x, other)) return py::none();
    call.log_variance = other.input();
  }
  if (!(flags & kDraw) && a[6] != Py_None) {
    if (!plain_like(a[6], x, other)) return py::none();
    call.noise.kind = Noise::given;
    call.noise.tensor = other.input();
  }
  if (!ready()) return py::none();
  Generator generator;
  if (flags & kDraw) {
    // Drawn in the pass of the step, block by block, which is in whole chunks.
    const int dtype = flags & kDrawFloat ? int(DType::f32) : m.dtype;
    if (x.elements % 16 || !generator.open(a[6], x.elements, dtype)) return py::none();
    call.noise.kind = Noise::drawn;
    call.noise.draws = &generator.arguments();
  }
  const int threads = threads_for(x.elements), like = flags & kLikeModel ? 3 : 2;
  const int has = like == 3 ? m.dtype : x.dtype;
  View y, estimate, entry;
  py::object result = make(a[like], has, has, y), x0 = py::none(), kept = py::none();
  call.y = y.output();
  if (flags & kX0) {
    x0 = make(a[like], has, has, estimate);
    call.x0 = estimate.output();
  }
  if (flags & kEntry) {
    kept = make(a[like], has, int(DType::f32), entry);
    // An entry that is the x0 estimate goes the shorter way of that.
    const float* c = (const float*)call.table.data;
    const bool estimates = c[h_x] == c[p_x] && c[h_m] == c[p_m] && c[h_x0] == 0 && call.clip < 0;
    (estimates && !(flags & kX0) && has == int(DType::f32) ? call.x0 : call.entry) = entry.output();
  }
  if (flags & kDraw) {
    run(call, false, threads);
    generator.close();
  } else {
    const Unlocked unlocked(call.layout);
    run(call, false, threads);
  }
  return py::make_tuple(std::move(result), std::move(x0), std::move(kept));
}

// table_noise(table, index, x0, n) -> x_t in the dtype of x0 and n, or None. index: the row, or int64 [batch] or [1].
py::object noise(PyObject* const* a) {
  const Table& table = table_of(a[0], 2);
  View x0, n, index, x_t;
  if (!plain(a[2], x0) || x0.dims < 1 || !plain_like(a[3], x0, n) || n.dtype != x0.dtype) return py::none();
  NoiseArguments call{};
  const int64_t batch = x0.sizes[0];
  int64_t single = 0;
  const int64_t* rows = &single;
  int64_t count = 1;
  if (PyLong_Check(a[1])) {
    single = parse_integer("index", a[1]);
  } else {
    if (!tensors::view(a[1], index) || index.dtype != tensors::kIndex || index.dims > 1) return py::none();
    rows = (const int64_t*)index.data;
    count = index.elements;
    if (count != 1 && count != batch) return py::none();
  }
  if (!ready()) return py::none();
  constexpr int64_t kInside = 128;
  float inside[2 * kInside];
  std::unique_ptr<float[]> more;
  float* numbers = inside;
  if (count > kInside) {
    more.reset(new float[size_t(2 * count)]);
    numbers = more.get();
  }
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = rows[r];
    if (at < 0 || at >= table.rows) return py::none();
    numbers[r] = table.numbers[size_t(2 * at)];
    numbers[count + r] = table.numbers[size_t(2 * at + 1)];
  }
  const int stride = count > 1;
  call.layout = {count, 1, 1, x0.elements / count, count, 1, count, x0.elements};
  call.alpha = {numbers, stride};
  call.sigma = {numbers + count, stride};
  call.x0 = x0.input();
  call.n.kind = Noise::given;
  call.n.tensor = n.input();
  py::object result = make(a[2], x0.dtype, x0.dtype, x_t);
  call.x_t = x_t.output();
  {
    const int threads = threads_for(x0.elements);
    const Unlocked unlocked(call.layout);
    run(call, false, threads);
  }
  return result;
}

// number(tensor, dims) -> the Python number in a CPU tensor of one element and so many dimensions; or None.
py::object number(PyObject* const* a) {
  View t;
  if (!torch.allowed || !tensors::enabled() || !tensors::view(a[0], t) || t.elements != 1) return py::none();
  if (t.dims != parse_integer("dims", a[1])) return py::none();
  if (t.dtype == tensors::kIndex) return owned(PyLong_FromLongLong(*(const int64_t*)t.data));
  if (t.dtype == int(DType::f32)) return owned(PyFloat_FromDouble(double(*(const float*)t.data)));
  if (t.dtype == int(DType::f64)) return owned(PyFloat_FromDouble(*(const double*)t.data));
  return py::none();
}

PyMethodDef methods[] = {fast_method<row, 9>("table_step"), fast_method<noise, 4>("table_noise"),
                         fast_method<number, 2>("number"), {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_step_table(py::module_& module) {
  module.def("coefficient_table", coefficient_table);
  module.def("enable_step_tables", enable);
  module.def("allow_step_tables", allow);
  module.def("allow_draws", allow_draws);
  module.def("torch_normal", torch_normal);
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastdiff
