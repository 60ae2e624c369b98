// Sequences of kernel launches on a GPU that are repeated with other tensors and numbers: the memory of their results is
// taken from PyTorch, pointers and numbers are filled in, and the driver is called. Which launches these are, Python says
// once for each kind of arguments (fastdiff/backends/triton/sequence.py). This file knows neither the kernels nor what they compute.
//
// The driver's library is opened when a GPU is there. Nothing of CUDA is included or linked.
#include "gpu_launch.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "fastcall.h"
#include "philox.h"
#include "tensors.h"

namespace fastdiff {

namespace {

using tensors::Device;
using tensors::View;

constexpr size_t kMostSlots = 64, kMostArguments = 128, kMostBytes = 1024, kMostKept = 512, kMostCells = 64;
constexpr int64_t kAlignment = 16;  // what the kernels of data were compiled for

// ---- the driver

struct Configuration {  // CUlaunchConfig
  unsigned grid[3], block[3], shared;
  void *stream, *attributes;
  unsigned count;
};
struct Driver {
  int (*launch)(const Configuration*, void* function, void** arguments, void** extra);
  int (*context)(void**);
  int (*capturing)(void* stream, int* status);
  int (*text)(int error, const char**);
};
Driver driver;
PyObject *empty_like_function, *dtype_keyword;

template <class Function>
void find(void* library, const char* name, Function& function) {
  function = (Function)dlsym(library, name);
  if (!function) throw std::runtime_error(std::string("the driver has no ") + name);
}

// Opens the driver. `empty_like`: PyTorch's. Raises RuntimeError where that cannot be.
void open(py::function empty_like) {
  if (driver.launch) return;
  if (!tensors::enabled()) throw std::runtime_error("this PyTorch does not let C++ read its tensors, which takes 2.10");
  void* library = dlopen("libcuda.so.1", RTLD_NOW);
  if (!library) throw std::runtime_error("libcuda.so.1 cannot be opened");
  Driver found;
  find(library, "cuLaunchKernelEx", found.launch);
  find(library, "cuCtxGetCurrent", found.context);
  find(library, "cuStreamIsCapturing", found.capturing);
  find(library, "cuGetErrorString", found.text);
  // Held as long as the process lives, as the module is.
  empty_like_function = empty_like.release().ptr();
  dtype_keyword = py::make_tuple("dtype").release().ptr();
  driver = found;
}

// ---- what is kept

// A slot is a pointer or a number that may change from call to call: of an argument of the call, a result, the workspace,
// the cell.
using Slots = uint64_t[kMostSlots];

struct Change {
  uint32_t at;  // byte of the parameters
  uint32_t slot;
  int64_t plus;  // to a pointer, in bytes
  bool single;   // a float32 of a Python float; otherwise 64 bits as they are
};

struct Launch {
  void* function;
  unsigned grid[2], threads, shared;
  std::string parameters;
  std::vector<uint32_t> places;  // of the parameters, in bytes
  std::vector<Change> changes;
};

struct Result {
  int like;            // an argument, or -1 for
  py::object example;  // a tensor like it, which is small
  py::object dtype;    // None for that of the argument
};

// What launches of one stream share, which follow each other.
struct Shared {
  uint64_t counters, partials;
  py::object held;
  std::vector<py::object> cells;  // (pointer, stream, a Python object); one that nobody else holds is free
};

struct Kept {
  void* context;
  std::vector<Launch> launches;
  std::vector<Result> made;
  std::vector<uint32_t> aligned;
  std::vector<int> returned;  // slots, or -1 for None
  py::object space, cell, held;
  std::unordered_map<void*, Shared> shared;
};

struct Sequences {
  std::unordered_map<std::string, std::shared_ptr<Kept>> kept;
};

constexpr const char* kName = "fastdiff.sequences";

// ---- the arguments of a call

// What a call's arguments are told apart by: of a tensor dtype, sizes, device and whether it is differentiated; of a number
// that it is one, and whether it is 0.0; of anything else, which object it is.
class Arguments {
 public:
  bool fit = true;
  Device device{-1, 0};  // of the first tensor
  std::string key;
  Slots slots;

  Arguments(PyObject* const* given, size_t count) {
    fit = count < kMostSlots;
    for (size_t k = 0; fit && k < count; ++k) read(given[k], slots[k]);
  }

 private:
  template <class T>
  void add(const T& value) {
    key.append((const char*)&value, sizeof(value));
  }

  void read(PyObject* given, uint64_t& slot) {
    if (tensors::is_tensor(given)) {
      View found;
      Device where;
      if (!(fit = tensors::view_anywhere(given, found, where))) return;
      if (device.type < 0) device = where;
      const bool recorded = found.floating() && tensors::requires_gradient(given) && grad();
      const int32_t head[] = {'t', recorded, found.dtype, where.type, where.id, found.dims};
      add(head);
      key.append((const char*)found.sizes, sizeof(int64_t) * size_t(found.dims));
      slot = (uint64_t)found.data;
    } else if (PyLong_CheckExact(given)) {
      int overflow;
      slot = uint64_t(PyLong_AsLongLongAndOverflow(given, &overflow));
      fit = !overflow;
      key += 'i';
    } else if (PyFloat_CheckExact(given)) {
      const double value = PyFloat_AS_DOUBLE(given);
      std::memcpy(&slot, &value, sizeof(slot));
      key += value == 0 ? 'z' : 'f';
    } else if (PyTuple_CheckExact(given)) {  // a cell
      fit = PyTuple_GET_SIZE(given) == 3;
      slot = fit ? number(PyTuple_GET_ITEM(given, 0)) : 0;
      if (fit) cell_stream_ = (void*)number(PyTuple_GET_ITEM(given, 1));
      has_cell_ = true;
      key += 'c';
    } else {
      slot = 0;
      key += 'o';
      add(given);
    }
  }

  bool grad() {
    if (grad_ < 0) grad_ = tensors::gradients_are_recorded();
    return grad_;
  }

  uint64_t number(PyObject* given) {
    const uint64_t found = PyLong_AsUnsignedLongLong(given);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      fit = false;
    }
    return found;
  }

  int grad_ = -1;
  bool has_cell_ = false;
  void* cell_stream_ = nullptr;

 public:
  // Whether a cell among the arguments is of this stream, or there is none.
  bool of_stream(void* stream) const { return !has_cell_ || cell_stream_ == stream; }
};

// ---- calls

class Allowing {  // other Python threads to run: the driver's queue may be full
 public:
  Allowing() : state_(PyEval_SaveThread()) {}
  ~Allowing() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

int launch(const Launch& what, const Slots& slots, void* stream) {
  char bytes[kMostBytes];
  void* arguments[kMostArguments];
  std::memcpy(bytes, what.parameters.data(), what.parameters.size());
  for (const Change& change : what.changes) {
    const uint64_t value = slots[change.slot] + uint64_t(change.plus);
    if (change.single) {
      double wide;
      std::memcpy(&wide, &value, sizeof(wide));
      const float number = float(wide);
      std::memcpy(bytes + change.at, &number, sizeof(number));
    } else {
      std::memcpy(bytes + change.at, &value, sizeof(value));
    }
  }
  for (size_t k = 0; k < what.places.size(); ++k) arguments[k] = bytes + what.places[k];
  const Configuration configuration{{what.grid[0], what.grid[1], 1}, {what.threads, 1, 1}, what.shared, stream, nullptr, 0};
  return driver.launch(&configuration, what.function, arguments, nullptr);
}

PyObject* tuple_of(const py::object& made, Py_ssize_t size) {
  if (!PyTuple_Check(made.ptr()) || PyTuple_GET_SIZE(made.ptr()) != size) throw py::type_error("expected a tuple of another size");
  return made.ptr();
}

Shared& shared_on(Kept& kept, void* stream) {
  const auto found = kept.shared.find(stream);
  if (found != kept.shared.end()) return found->second;
  Shared made{};
  if (!kept.space.is_none()) {
    made.held = kept.space();
    PyObject* const space = tuple_of(made.held, 3);
    made.counters = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(space, 0));
    made.partials = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(space, 1));
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  return kept.shared.emplace(stream, std::move(made)).first->second;
}

py::object free_cell(Kept& kept, Shared& shared) {
  for (const py::object& cell : shared.cells)
    if (Py_REFCNT(cell.ptr()) == 1) return cell;
  py::object made = kept.cell();
  tuple_of(made, 3);
  if (shared.cells.size() < kMostCells) shared.cells.push_back(made);
  return made;
}

// A tuple of what is returned, or None where nothing is kept for such arguments, or False where it is not for this call.
py::object run(Sequences& all, PyObject* const* given, size_t count) {
  if (!driver.launch) return py::none();
  const py::object otherwise = py::bool_(false);
  Arguments arguments(given, count);
  if (!arguments.fit) return otherwise;
  const auto found = all.kept.find(arguments.key);
  if (found == all.kept.end()) return py::none();
  const std::shared_ptr<Kept> kept = found->second;
  Slots& slots = arguments.slots;
  uint64_t bits = 0;
  for (const uint32_t slot : kept->aligned) bits |= slots[slot];
  void *stream = nullptr, *context = nullptr;
  int capturing = 1;
  if (bits % kAlignment || tensors::transformed() || !tensors::current_stream(arguments.device, stream) ||
      driver.context(&context) || context != kept->context || driver.capturing(stream, &capturing) || capturing ||
      !arguments.of_stream(stream))
    return otherwise;
  size_t next = count;
  py::object made[kMostSlots];
  for (const Result& result : kept->made) {
    // Not through DLPack's allocator: what that makes does not know record_stream.
    PyObject* const how[] = {result.like < 0 ? result.example.ptr() : given[result.like], result.dtype.ptr()};
    made[next] = owned(result.dtype.is_none() ? PyObject_CallOneArg(empty_like_function, how[0])
                                              : PyObject_Vectorcall(empty_like_function, how, 1, dtype_keyword));
    View view;
    Device where;
    if (!tensors::view_anywhere(made[next].ptr(), view, where) || !(where == arguments.device)) return otherwise;
    slots[next++] = (uint64_t)view.data;
  }
  if (!kept->space.is_none() || !kept->cell.is_none()) {
    Shared& shared = shared_on(*kept, stream);
    slots[next++] = shared.counters;
    slots[next++] = shared.partials;
    if (!kept->cell.is_none()) {
      made[next] = free_cell(*kept, shared);
      slots[next] = PyLong_AsUnsignedLongLong(PyTuple_GET_ITEM(made[next].ptr(), 0));
      ++next;
    }
  }
  int error = 0;
  {
    const Allowing others;
    for (const Launch& what : kept->launches)
      if ((error = launch(what, slots, stream)) != 0) break;
  }
  if (error) {
    const char* text = nullptr;
    driver.text(error, &text);
    throw std::runtime_error(std::string("a kernel was not launched: ") + (text ? text : "unknown") + " (CUDA error " +
                             std::to_string(error) + ").");
  }
  py::tuple results(kept->returned.size());
  for (size_t k = 0; k < kept->returned.size(); ++k) {
    const int slot = kept->returned[k];
    results[k] = slot < 0 ? py::none() : size_t(slot) < count ? py::reinterpret_borrow<py::object>(given[slot]) : made[slot];
  }
  return results;
}

// ---- keeping

Sequences* sequences_of(PyObject* capsule) {
  auto* found = (Sequences*)PyCapsule_GetPointer(capsule, kName);
  if (!found) throw py::error_already_set();
  return found;
}

PyObject* run_method(PyObject* self, PyObject* const* given, Py_ssize_t count) {
  return guarded([&] { return run(*sequences_of(self), given, size_t(count)); });
}

PyMethodDef method{"run", (PyCFunction)(void (*)())run_method, METH_FASTCALL, nullptr};

// () -> (run, what `keep` takes): no sequences yet.
py::tuple sequences() {
  const py::capsule capsule(new Sequences, kName, [](void* found) { delete (Sequences*)found; });
  return py::make_tuple(owned(PyCFunction_New(&method, capsule.ptr())), capsule);
}

Launch parse_launch(const py::tuple& from, size_t slots) {
  if (py::len(from) != 8) throw py::value_error("launch: expected eight parts");
  Launch to;
  to.function = (void*)from[0].cast<uint64_t>();
  to.grid[0] = from[1].cast<unsigned>();
  to.grid[1] = from[2].cast<unsigned>();
  to.threads = from[3].cast<unsigned>();
  to.shared = from[4].cast<unsigned>();
  to.parameters = from[5].cast<std::string>();
  to.places = from[6].cast<std::vector<uint32_t>>();
  if (!to.function || !to.grid[0] || !to.grid[1] || !to.threads) throw py::value_error("launch: nothing to run");
  if (to.parameters.size() > kMostBytes || to.places.size() > kMostArguments) throw py::value_error("launch: too many parameters");
  for (const uint32_t place : to.places)
    if (place >= to.parameters.size()) throw py::value_error("launch: a parameter lies outside");
  for (const py::handle change : from[7].cast<py::tuple>()) {
    const auto [at, slot, plus, single] = change.cast<std::tuple<uint32_t, uint32_t, int64_t, bool>>();
    if (at + (single ? 4u : 8u) > to.parameters.size() || slot >= slots) throw py::value_error("launch: a change lies outside");
    to.changes.push_back({at, slot, plus, single});
  }
  return to;
}

// keep(given, launches, made, aligned, returned, space, cell, held): what `run` is to do with arguments like `given`, in the
// context that is current.
//
//   launches  of (function, grid, grid, threads, shared memory, parameters, their places, changes), a change being (byte,
//             slot, bytes to add, whether it is a float32). Slots: the arguments, what is made, where there is a space or
//             a cell counters and partial sums, and the cell.
//   made      of tensors: the argument that one is like, or an example; and its dtype, or None for the same
//   aligned   the arguments that must be aligned
//   space     () -> (pointer to counters, pointer to partial sums, what holds them) of the current stream; or None
//   cell      () -> (pointer, stream, what holds it), or None
void keep(py::capsule sequences, py::tuple given, py::tuple launches, py::tuple made, std::vector<uint32_t> aligned,
          std::vector<int> returned, py::object space, py::object cell, py::object held) {
  if (!driver.launch) throw std::runtime_error("the driver is not open");
  Sequences& all = *sequences_of(sequences.ptr());
  const size_t count = py::len(given);
  const Arguments arguments(PySequence_Fast_ITEMS(given.ptr()), count);
  const auto kept = std::make_shared<Kept>();
  if (!arguments.fit || arguments.device.type < 0 || driver.context(&kept->context) || !kept->context) return;
  const bool shares = !space.is_none() || !cell.is_none();
  const size_t slots = count + py::len(made) + (shares ? 2 : 0) + !cell.is_none();
  if (slots > kMostSlots) throw py::value_error("made: too many");
  for (const py::handle launch : launches) kept->launches.push_back(parse_launch(launch.cast<py::tuple>(), slots));
  for (const py::handle result : made) {
    const auto how = result.cast<py::tuple>();
    if (py::len(how) != 2) throw py::value_error("made: expected (argument or example, dtype)");
    const bool like = py::isinstance<py::int_>(how[0]);
    const int slot = like ? how[0].cast<int>() : -1;
    PyObject* const example = like && slot >= 0 && slot < int(count) ? py::object(given[slot]).ptr() : py::object(how[0]).ptr();
    if (!tensors::is_tensor(example)) throw py::value_error("made: is like no tensor");
    kept->made.push_back({slot, like ? py::none() : py::object(how[0]), how[1]});
  }
  for (const uint32_t slot : aligned)
    if (slot >= count) throw py::value_error("aligned: no such argument");
  for (const int slot : returned)
    if (slot >= int(slots)) throw py::value_error("returned: no such slot");
  kept->aligned = std::move(aligned);
  kept->returned = std::move(returned);
  kept->space = std::move(space);
  kept->cell = std::move(cell);
  py::list objects;  // those that the key names stay what they are
  for (const py::handle object : given)
    if (!tensors::is_tensor(object.ptr()) && !PyTuple_CheckExact(object.ptr())) objects.append(object);
  kept->held = py::make_tuple(held, objects);
  if (all.kept.size() >= kMostKept) all.kept.clear();
  all.kept[arguments.key] = kept;
}

// ---- a generator of a GPU

py::object ask(py::handle generator, const char* method) { return owned(PyObject_CallMethod(generator.ptr(), method, nullptr)); }

// draw_seed(generator) -> what torch.randint(-2**63, 2**63 - 1, (1,)) draws from it on a GPU, which takes the first two words of
// Philox4x32-10 at its offset and moves that on by four. One call, so that no other Python thread comes between.
int64_t draw_seed(py::handle generator) {
  const uint64_t seed = PyLong_AsUnsignedLongLongMask(ask(generator, "initial_seed").ptr());
  const uint64_t offset = PyLong_AsUnsignedLongLong(ask(generator, "get_offset").ptr());
  if (PyErr_Occurred()) throw py::error_already_set();
  owned(PyObject_CallMethod(generator.ptr(), "set_offset", "K", (unsigned long long)(offset + 4)));
  // The counter counts groups of four words: its lower half stands where our noise has group and stream.
  const philox::Words words = philox::words(seed, uint32_t(offset / 4), uint32_t((offset / 4) >> 32), 0);
  const uint64_t bits = uint64_t(words.o[0]) << 32 | words.o[1];
  return int64_t((bits == ~uint64_t(0) ? 0 : bits) + (uint64_t(1) << 63));
}

}  // namespace

void bind_gpu_launch(py::module_& module) {
  module.def("gpu_open", open);
  module.def("gpu_sequences", sequences);
  module.def("gpu_keep", keep);
  module.def("draw_seed", draw_seed);
}

}  // namespace fastdiff
