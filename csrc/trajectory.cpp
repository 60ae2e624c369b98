#include "trajectory.h"

#include <cstring>
#include <memory>
#include <string>

#include "checks.h"
#include "cpu/run.h"
#include "tensors.h"
#include "unlocked.h"

namespace fastdiff {

namespace {

// What stays the same from step to step, and where the run is. It points into memory that Python holds.
struct Run {
  StepArguments step;  // x is what the last step wrote; y and the model input are where the next one writes
  Layout by_sample;    // for rows or thresholds, which are one a sample
  Rows guidance, guidance_by_sample;
  bool wide;
  int threads, dims;
  int64_t sizes[64];
  const char* table;
  int64_t rows;
  Noise made;      // what streams are of; none: nothing can be made
  char* history;   // `capacity` tensors in the compute dtype, one behind the other
  int capacity, count;
  int order[kHistory];  // the places of those in use, the latest first

  int64_t elements() const { return step.layout.elements; }
  int64_t compute_size() const { return wide ? 8 : 4; }
  DType compute() const { return wide ? DType::f64 : DType::f32; }
  double coefficient(int64_t row, int column) const {
    const int64_t at = row * kColumns + column;
    return wide ? ((const double*)table)[at] : double(((const float*)table)[at]);
  }
};

int64_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

bool overlap(const void* a, int64_t a_bytes, const void* b, int64_t b_bytes) {
  return (const char*)a < (const char*)b + b_bytes && (const char*)b < (const char*)a + a_bytes;
}

// The network's output, both halves of it for a guided step: a plain tensor of the right shape, or, with `memory`, the
// memory of one. False: it is no such tensor, or lies across what this step writes otherwise than element on element.
bool find_output(const Run& run, PyObject* value, bool memory, bool guided, Input& m, Input& uncond) {
  const int64_t elements = run.elements(), wanted = guided ? 2 * elements : elements;
  Input found;
  if (memory) {
    found = parse_input("m", value, wanted);
  } else {
    tensors::View view;
    if (!tensors::enabled() || !tensors::view(value, view) || !view.floating() || view.dims != run.dims) return false;
    if (view.elements != wanted) return false;
    if (std::memcmp(view.sizes + 1, run.sizes + 1, sizeof(int64_t) * size_t(run.dims - 1)) != 0) return false;
    found = view.input();
  }
  const StepArguments& step = run.step;
  const int64_t size = size_of(found.dtype), own = size_of(step.x.dtype), copies = step.copies * elements;
  const void* seen = step.model_input.data;
  const bool across = overlap(found.data, wanted * size, step.y.data, elements * own) ||
                      (seen && overlap(found.data, wanted * size, seen, copies * own));
  // What the network was given: y, with its copy behind it, or the model input.
  const bool same = size == own && (found.data == step.y.data || (found.data == seen && copies == wanted));
  if (across && !same) return false;
  m = uncond = found;
  if (guided)
    m.data = (const char*)found.data + elements * size;
  else
    uncond.data = nullptr;
  return true;
}

void find_noise(const Run& run, PyObject* value, bool wanted, Noise& noise) {
  noise.kind = Noise::none;
  if (value == Py_None) return;
  if (PyTuple_Check(value)) {
    noise = parse_noise("noise", value, run.step.layout);
    return;
  }
  const int64_t stream = parse_integer("noise", value);
  if (run.made.kind != Noise::made) throw py::value_error("noise: there is no seed to make it from");
  if (stream < 0 || stream > UINT32_MAX) throw py::value_error("noise: a stream has 32 bits");
  if (!wanted) return;
  noise = run.made;
  noise.stream = uint32_t(stream);
}

// What this step reads of the history, and where its entry goes: over the oldest once all places are in use.
int find_history(Run& run, int64_t k, StepArguments& step) {
  const int64_t bytes = run.elements() * run.compute_size();
  for (int j = 0; j < kHistory; ++j) step.history[j] = {nullptr, run.compute()};
  int depth = kHistory;
  while (depth && run.coefficient(k, c_h1 + depth - 1) == 0) --depth;
  for (int j = 0; j < depth && j < run.count; ++j) step.history[j].data = run.history + run.order[j] * bytes;
  const bool keeps = run.coefficient(k, h_x) != 0 || run.coefficient(k, h_m) != 0 || run.coefficient(k, h_x0) != 0;
  step.entry = {nullptr, run.compute(), false};
  if (!keeps || !run.capacity) return -1;
  const int place = run.count < run.capacity ? run.count : run.order[run.capacity - 1];
  step.entry.data = run.history + place * bytes;
  return place;
}

void keep(Run& run, int place) {
  if (place < 0) return;
  if (run.count < run.capacity) ++run.count;
  for (int j = run.count - 1; j > 0; --j) run.order[j] = run.order[j - 1];
  run.order[0] = place;
}

enum Argument { kRow, kOutput, kGuided, kNoise, kFew, kLogVariance = kFew, kThreshold, kOwnRow, kHistoryGiven, kX0, kAll };

// step(k, m, guided, noise [, log_variance, threshold, row, history, x0]) -> whether it was done; if not, m is not what
// find_output takes. See fastdiff/ops/step.py. m: a tensor, or with all arguments memory; noise: None, a stream, or
// memory; the rest is memory or None.
bool launch(Run& run, PyObject* const* a, Py_ssize_t given) {
  const int64_t k = parse_integer("k", a[kRow]);
  if (k < 0 || k >= run.rows) throw py::value_error("k: there is no such row");
  if (!run.step.y.data) throw py::value_error("y: no target was given");
  StepArguments step = run.step;
  const bool guided = a[kGuided] == Py_True;
  const bool more = given == kAll;
  if (!find_output(run, a[kOutput], more, guided, step.m, step.uncond)) return false;
  step.table = {run.table + k * kColumns * run.compute_size(), 0};
  step.guidance = run.guidance;
  const int place = find_history(run, k, step);
  const bool spread = more && a[kLogVariance] != Py_None;
  find_noise(run, a[kNoise], spread || run.coefficient(k, c_noise) != 0, step.noise);
  if (more) {
    const int64_t elements = run.elements();
    step.log_variance = parse_optional_input("log_variance", a[kLogVariance], elements);
    if (a[kThreshold] != Py_None || a[kOwnRow] != Py_None) {
      step.layout = run.by_sample;
      step.guidance = run.guidance_by_sample;
      RowParser rows{step.layout, true, run.wide};
      step.threshold = rows.optional("threshold", a[kThreshold]);
      if (a[kOwnRow] != Py_None) step.table = rows.required("row", a[kOwnRow], kColumns);
    }
    if (a[kHistoryGiven] != Py_None) {
      const py::handle history = a[kHistoryGiven];
      if (!PyTuple_Check(history.ptr()) || PyTuple_GET_SIZE(history.ptr()) > kHistory)
        throw py::value_error("history: expected a tuple of at most 4 tensors");
      for (int j = 0; j < kHistory; ++j)
        step.history[j] = j < PyTuple_GET_SIZE(history.ptr())
                              ? parse_input("history", PyTuple_GET_ITEM(history.ptr(), j), elements)
                              : Input{nullptr, DType::f32};
    }
    step.x0 = parse_optional_output("x0", a[kX0], elements);
  }
  {
    const Unlocked unlocked(step.layout);
    fastdiff::run(step, run.wide, run.threads);
  }
  keep(run, place);
  run.step.x = {run.step.y.data, run.step.y.dtype};
  return true;
}

// target(y, model_input): where the next steps write to. The model input is None, or memory of one or two copies.
void aim(Run& run, PyObject* const* a) {
  const int64_t elements = run.elements();
  const Output y = parse_output("y", a[0], elements);
  if (y.dtype != run.step.x.dtype) throw py::value_error("y: must be of the dtype of x");
  const bool wanted = a[1] != Py_None;
  const int copies = wanted && elements && parse_memory("model_input", a[1]).elements == 2 * elements ? 2 : 1;
  const Output seen = parse_optional_output("model_input", a[1], copies * elements);
  if (wanted && seen.dtype != y.dtype) throw py::value_error("model_input: must be of the dtype of x");
  run.step.y = y;
  run.step.model_input = seen;
  run.step.copies = copies;
}

constexpr const char* kName = "fastdiff.run";

template <class Function>
PyObject* guarded(PyObject* capsule, Function function) {
  try {
    return function(*(Run*)PyCapsule_GetPointer(capsule, kName)).release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

PyObject* call_step(PyObject* capsule, PyObject* const* arguments, Py_ssize_t given) {
  return guarded(capsule, [&](Run& run) -> py::object {
    if (given != kFew && given != kAll) throw py::type_error("step: expected 4 or 9 arguments");
    return py::bool_(launch(run, arguments, given));
  });
}

PyObject* call_target(PyObject* capsule, PyObject* const* arguments, Py_ssize_t given) {
  return guarded(capsule, [&](Run& run) -> py::object {
    if (given != 2) throw py::type_error("target: expected 2 arguments");
    aim(run, arguments);
    return py::none();
  });
}

PyMethodDef step_method = {"step", (PyCFunction)(void (*)())call_step, METH_FASTCALL, nullptr};
PyMethodDef target_method = {"target", (PyCFunction)(void (*)())call_target, METH_FASTCALL, nullptr};

// (step, target): functions of one run. `sizes`: of x; `guidance`, `guidance_by_sample`: rows of the two layouts;
// `table`: kColumns numbers a step; `made`: noise as parse_noise takes it, whose stream each step replaces, or None;
// `history`: memory of as many tensors as are kept, in the compute dtype, or None.
py::tuple trajectory(py::handle x, py::handle sizes, py::handle layout, py::handle guidance, py::handle by_sample,
                     py::handle guidance_by_sample, py::handle table, py::handle clip, py::handle mask,
                     py::handle known, py::handle known_noise, py::handle made, py::handle history,
                     py::handle threads) {
  auto run = std::make_unique<Run>();
  std::memset((void*)run.get(), 0, sizeof(Run));
  StepArguments& step = run->step;
  step.layout = parse_layout(layout);
  step.copies = 1;
  const int64_t elements = run->elements();
  run->by_sample = parse_layout(by_sample);
  if (run->by_sample.elements != elements) throw py::value_error("layout: the two must be of the same elements");
  const Memory rows = parse_memory("table", table);
  if (rows.code > int(DType::f64) || rows.elements % kColumns)
    throw py::value_error("table: must be float32 or float64, rows of " + std::to_string(int(kColumns)));
  run->wide = rows.code == int(DType::f64);
  run->table = (const char*)rows.data;
  run->rows = rows.elements / kColumns;
  run->guidance = RowParser{step.layout, true, run->wide}.required("guidance", guidance);
  run->guidance_by_sample = RowParser{run->by_sample, true, run->wide}.required("guidance", guidance_by_sample);
  step.x = parse_input("x", x, elements);
  if (!PyTuple_Check(sizes.ptr()) || PyTuple_GET_SIZE(sizes.ptr()) < 1 || PyTuple_GET_SIZE(sizes.ptr()) > 64)
    throw py::value_error("sizes: expected a tuple of 1 to 64");
  run->dims = int(PyTuple_GET_SIZE(sizes.ptr()));
  int64_t product = 1;
  for (int d = 0; d < run->dims; ++d) {
    run->sizes[d] = parse_integer("sizes", PyTuple_GET_ITEM(sizes.ptr(), d));
    if (run->sizes[d] < 0 || __builtin_mul_overflow(product, run->sizes[d], &product))
      throw py::value_error("sizes: must be countable");
  }
  if (product != elements) throw py::value_error("sizes: are not those of the layout");
  step.clip = clip.is_none() ? -1 : parse_number("clip", clip);
  if (!clip.is_none() && !(step.clip >= 0)) throw py::value_error("clip: must be at least 0, or None");
  step.mask = parse_optional_mask(mask, step.layout);
  step.known = parse_optional_input("known", known, elements);
  step.known_noise = parse_optional_noise("known_noise", known_noise, step.layout);
  if (!step.mask.tensor.data != !step.known.data) throw py::value_error("known: goes with mask, both or neither");
  run->made = parse_optional_noise("made", made, step.layout);
  if (run->made.kind == Noise::given) throw py::value_error("made: expected (seed, stream, sample_offset, offset)");
  if (!history.is_none()) {
    const Memory memory = parse_memory("history", history);
    if (memory.code != int(run->compute())) throw py::value_error("history: must be of the compute dtype");
    if (!elements || memory.elements % elements || memory.elements / elements > kHistory)
      throw py::value_error("history: must have room for 1 to 4 tensors");
    run->history = (char*)memory.data;
    run->capacity = int(memory.elements / elements);
  }
  run->threads = parse_threads(threads);
  const py::capsule capsule(run.release(), kName, [](void* found) { delete (Run*)found; });
  const auto function = [&](PyMethodDef& method) {
    py::object made_function = py::reinterpret_steal<py::object>(PyCFunction_New(&method, capsule.ptr()));
    if (!made_function) throw py::error_already_set();
    return made_function;
  };
  return py::make_tuple(function(step_method), function(target_method));
}

}  // namespace

void bind_trajectory(py::module_& module) { module.def("trajectory", trajectory); }

}  // namespace fastdiff
