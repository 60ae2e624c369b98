#include "trajectory.h"

#include <cstring>
#include <memory>
#include <string>

#include "fastcall.h"
#include "operations.h"
#include "tensors.h"

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
  const uint32_t stream = parse_stream(value);
  if (run.made.kind != Noise::made) throw py::value_error("noise: there is no seed to make it from");
  if (!wanted) return;
  noise = run.made;
  noise.stream = stream;
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
    const bool by_sample = a[kThreshold] != Py_None || a[kOwnRow] != Py_None;
    Reader read(by_sample ? run.by_sample : step.layout, true, run.wide);
    if (by_sample) step.guidance = run.guidance_by_sample;
    StepOperands from{};
    from.log_variance = a[kLogVariance];
    from.threshold = a[kThreshold];
    if (a[kOwnRow] != Py_None) from.table = a[kOwnRow];
    if (a[kHistoryGiven] != Py_None) from.history = a[kHistoryGiven];
    from.x0 = a[kX0];
    fill(read, from, step);
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
  StepArguments& step = run.step;
  Reader read(step.layout, true, run.wide);
  StepOperands to{};
  to.y = a[0];
  to.model_input = a[1];
  fill(read, to, step);
  const bool fits = step.y.dtype == step.x.dtype;
  if (fits && (!step.model_input.data || step.model_input.dtype == step.x.dtype)) return;
  step.y.data = nullptr;
  throw py::value_error(std::string(fits ? "model_input" : "y") + ": must be of the dtype of x");
}

constexpr const char* kName = "fastdiff.run";

Run& run_of(PyObject* capsule) { return *(Run*)PyCapsule_GetPointer(capsule, kName); }

PyObject* call_step(PyObject* capsule, PyObject* const* arguments, Py_ssize_t given) {
  return guarded([&] {
    if (given != kFew && given != kAll) throw py::type_error("step: expected 4 or 9 arguments");
    return py::bool_(launch(run_of(capsule), arguments, given));
  });
}

PyObject* call_target(PyObject* capsule, PyObject* const* arguments, Py_ssize_t given) {
  return guarded([&] {
    if (given != 2) throw py::type_error("target: expected 2 arguments");
    aim(run_of(capsule), arguments);
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
  run->by_sample = parse_layout(by_sample);
  const Layout own = parse_layout(layout);
  const int64_t elements = own.elements;
  if (own.starts || run->by_sample.starts) throw py::value_error("layout: a run has samples of one size");
  if (run->by_sample.elements != elements) throw py::value_error("layout: the two must be of the same elements");
  const Memory rows = parse_table(table, run->rows);
  run->wide = rows.code == int(DType::f64);
  run->table = (const char*)rows.data;
  Reader read(own, true, run->wide);
  read.rows("guidance", guidance, run->guidance);
  Reader(run->by_sample, true, run->wide).rows("guidance", guidance_by_sample, run->guidance_by_sample);
  StepOperands from{};
  from.x = x.ptr();
  from.clip = clip.ptr();
  from.mask = mask.ptr();
  from.known = known.ptr();
  from.known_noise = known_noise.ptr();
  fill(read, from, run->step);
  if (given(made)) read.noise("made", made, run->made);
  if (run->made.kind == Noise::given) throw py::value_error("made: expected (seed, stream, samples, offset)");
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
  const auto function = [&](PyMethodDef& method) { return owned(PyCFunction_New(&method, capsule.ptr())); };
  return py::make_tuple(function(step_method), function(target_method));
}

}  // namespace

void bind_trajectory(py::module_& module) { module.def("trajectory", trajectory); }

}  // namespace fastdiff
