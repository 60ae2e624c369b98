#include "step_table.h"

#include <memory>
#include <vector>

#include "cpu/torch_state.h"
#include "fastcall.h"
#include "operations.h"
#include "tensors.h"

namespace fastdiff {

namespace {

using tensors::View;

// What PyTorch has and we need, held as long as the process lives.
struct {
  PyObject *generator_type, *default_generator, *thread_count;
  PyObject *get_state, *set_state, *data_ptr, *numel;
  bool known, allowed;  // known: these are set; allowed: CPU tensors are the native backend's
  int draws;            // what torch.randn need not draw: 1 float32, 2 bfloat16 and float16 too
} torch;

void enable(py::object generator_type, py::object default_generator, py::function thread_count) {
  torch.generator_type = generator_type.release().ptr();
  torch.default_generator = default_generator.release().ptr();
  torch.thread_count = thread_count.release().ptr();
  torch.get_state = PyUnicode_InternFromString("get_state");
  torch.set_state = PyUnicode_InternFromString("set_state");
  torch.data_ptr = PyUnicode_InternFromString("data_ptr");
  torch.numel = PyUnicode_InternFromString("numel");
  torch.known = torch.allowed = true;
}

void allow(bool allowed) { torch.allowed = allowed; }
void allow_draws(int draws) { torch.draws = draws; }

// Few elements are done by the calling thread (run.cpp), and nobody has to be asked.
int threads_for(int64_t elements) {
  if (elements < 32768) return 1;
  return int(parse_integer("threads", owned(PyObject_CallNoArgs(torch.thread_count))));
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

bool ready() { return torch.allowed && !tensors::transformed(); }

enum Flags { kX0 = 1, kEntry = 2, kLikeModel = 4, kSame = 8, kDraw = 16, kDrawFloat = 32 };

// table_step(table, k, x, m, clip, history, noise, log_variance, flags) -> (y, x0 or None, entry or None), or None.
//   noise   a tensor or None; with kDraw a generator, None, or a list of one, to draw from as torch.randn does: in the
//           dtype of m, or with kDrawFloat in float32
//   flags   those of fastdiff/ops/step_table.py
py::object row(PyObject* const* a) {
  const Table& table = table_of(a[0], kColumns);
  const int64_t k = parse_integer("k", a[1]), flags = parse_integer("flags", a[8]);
  if (k < 0 || k >= table.rows) return py::none();
  tensors::Reader read(a[2], false, true);
  const int64_t elements = read.layout.elements;
  read.layout = {1, 1, 1, elements, 1, 1, 1, elements};
  StepOperands from{};
  from.x = a[2];
  from.m = a[3];
  from.clip = a[4];
  from.history = a[5];
  if (!(flags & kDraw)) from.noise = a[6];
  from.log_variance = a[7];
  StepArguments call{};
  call.table = {table.numbers.data() + k * kColumns, 0};
  fill(read, from, call);
  if (!read.fits || ((flags & kSame) && call.x.dtype != call.m.dtype) || !ready()) return py::none();
  Generator generator;
  if (flags & kDraw) {
    // Drawn in the pass of the step, block by block, which is in whole chunks.
    const int dtype = int(flags & kDrawFloat ? DType::f32 : call.m.dtype);
    if (elements % 16 || !generator.open(a[6], elements, dtype)) return py::none();
    call.noise.kind = Noise::drawn;
    call.noise.draws = &generator.arguments();
  }
  const int threads = threads_for(elements), like = flags & kLikeModel ? 3 : 2;
  const DType has = like == 3 ? call.m.dtype : call.x.dtype;
  py::object result = tensors::make_like(a[like], has, has, elements, call.y), x0 = py::none(), kept = py::none();
  if (flags & kX0) x0 = tensors::make_like(a[like], has, has, elements, call.x0);
  if (flags & kEntry) {
    // An entry that is the x0 estimate goes the shorter way of that.
    const float* c = (const float*)call.table.data;
    const bool estimates = c[h_x] == c[p_x] && c[h_m] == c[p_m] && c[h_x0] == 0 && call.clip < 0;
    const bool shorter = estimates && !(flags & kX0) && has == DType::f32;
    kept = tensors::make_like(a[like], has, DType::f32, elements, shorter ? call.x0 : call.entry);
  }
  if (flags & kDraw) {
    run(call, false, threads);
    generator.close();
  } else {
    run_unlocked(read, call, threads);
  }
  return py::make_tuple(std::move(result), std::move(x0), std::move(kept));
}

// table_noise(table, index, x0, n) -> x_t in the dtype of x0 and n, or None. index: the row, or int64 [batch] or [1].
py::object noise(PyObject* const* a) {
  const Table& table = table_of(a[0], 2);
  tensors::Reader read(a[2], false, true);
  const int64_t batch = read.layout.samples, elements = read.layout.elements;
  int64_t single = 0;
  const int64_t* rows = &single;
  int64_t count = 1;
  View index;
  if (PyLong_Check(a[1])) {
    single = parse_integer("index", a[1]);
  } else {
    if (!tensors::view(a[1], index) || index.dtype != tensors::kIndex || index.dims > 1) return py::none();
    rows = (const int64_t*)index.data;
    count = index.elements;
    if (count != 1 && count != batch) return py::none();
  }
  if (!read.fits) return py::none();
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
  read.layout = {count, 1, 1, elements / count, count, 1, count, elements};
  NoiseOperands from{};
  from.x0 = a[2];
  from.n = a[3];
  NoiseArguments call{};
  call.alpha = {numbers, stride};
  call.sigma = {numbers + count, stride};
  fill(read, from, call);
  if (!read.fits || call.n.tensor.dtype != call.x0.dtype || !ready()) return py::none();
  py::object result = tensors::make_like(a[2], call.x0.dtype, call.x0.dtype, elements, call.x_t);
  run_unlocked(read, call, threads_for(elements));
  return result;
}

// number(tensor, dims) -> the Python number in a CPU tensor of one element and so many dimensions; or None.
py::object number(PyObject* const* a) {
  View t;
  if (!torch.allowed || !tensors::view(a[0], t) || t.elements != 1) return py::none();
  if (t.dims != parse_integer("dims", a[1])) return py::none();
  if (t.dtype == tensors::kIndex) return owned(PyLong_FromLongLong(*(const int64_t*)t.data));
  if (t.dtype == int(DType::f32)) return owned(PyFloat_FromDouble(double(*(const float*)t.data)));
  if (t.dtype == int(DType::f64)) return owned(PyFloat_FromDouble(*(const double*)t.data));
  return py::none();
}

using tensors::fast_call;

PyMethodDef methods[] = {fast_method<fast_call<row>, 9>("table_step"), fast_method<fast_call<noise>, 4>("table_noise"),
                         fast_method<fast_call<number>, 2>("number"), {nullptr, nullptr, 0, nullptr}};

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
