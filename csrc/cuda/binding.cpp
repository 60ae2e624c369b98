#include "binding.h"

#include "../checks.h"
#include "step.h"

namespace fastdiff {
namespace cuda {

namespace {

int parse_device(py::handle value) {
  const int64_t device = parse_integer("device", value);
  if (device < 0 || device > 1023) throw py::value_error("device: must be from 0 to 1023");
  return int(device);
}

Tensor parse_data(const char* name, py::handle value, int64_t elements) {
  const Input input = parse_input(name, value, elements);
  if (input.dtype == DType::f64) throw py::value_error(std::string(name) + ": must be float32, bfloat16 or float16");
  return {(void*)input.data, int(input.dtype)};
}

Tensor parse_optional_data(const char* name, py::handle value, int64_t elements) {
  return value.is_none() ? Tensor{nullptr, kF32} : parse_data(name, value, elements);
}

Tensor parse_kept(const char* name, py::handle value, int64_t elements) {
  const Tensor tensor = parse_optional_data(name, value, elements);
  if (tensor.code != kF32) throw py::value_error(std::string(name) + ": must be float32");
  return tensor;
}

// A number, or float32 memory of one, or one a sample.
Numbers parse_numbers(const char* name, py::handle value, int64_t samples) {
  if (!PyTuple_Check(value.ptr())) return {nullptr, float(parse_number(name, value)), 0};
  Rows parsed{};
  Reader read({samples, 1, 1, 1, samples, 1, samples, samples});
  read.rows(name, value, parsed);
  if (read.wide) throw py::value_error(std::string(name) + ": must be float32");
  return {(const float*)parsed.data, 0, parsed.stride};
}

// (seed, stream, sample_offset) where a seed is a number or int64 memory of one, and a stream a number or int64 memory
// of one a row of the table; or memory of the elements.
Noise parse_source(const char* name, py::handle value, const StepArguments& a, bool streams) {
  Noise noise{};
  if (value.is_none()) return noise;
  if (!PyTuple_Check(value.ptr()) || PyTuple_GET_SIZE(value.ptr()) != 4) {
    noise.kind = Noise::given;
    noise.tensor = parse_data(name, value, a.elements);
    return noise;
  }
  noise.kind = Noise::made;
  const py::handle seed = PyTuple_GET_ITEM(value.ptr(), 0), stream = PyTuple_GET_ITEM(value.ptr(), 1);
  if (PyTuple_Check(seed.ptr())) {
    const Indices found = parse_indices(seed);
    if (found.count != 1) throw py::value_error("seed: must be one int64");
    noise.seed = found.data;
  } else {
    noise.seed_value = parse_seed(seed);
  }
  if (PyTuple_Check(stream.ptr())) {
    const Indices found = parse_indices(stream);
    if (!streams || found.count != a.rows) throw py::value_error("stream: must be a number, or one a row of the table");
    noise.streams = found.data;
  } else {
    noise.stream = parse_stream(stream);
  }
  noise.sample_offset = uint64_t(parse_integer("sample_offset", PyTuple_GET_ITEM(value.ptr(), 2)));
  if (parse_number("offset", PyTuple_GET_ITEM(value.ptr(), 3)) != 0)
    throw py::value_error("offset: this kernel makes no offset noise");
  if (a.sample > int64_t(1) << 34) throw py::value_error("layout: noise can be made for samples of at most 2^34 elements");
  return noise;
}

// One step. See step.h; what is not said there:
//
//   layout    (samples, elements of a sample)
//   table     float32 memory of rows of kColumns: without an index one, or one a sample
//   index     None, or int64 memory of one, or one a sample
//   ticket    None, or int64 memory of one number, whose lower half is the count of blocks
//   mask      None, or (pointer, dtype, elements, inner, stride)
//   noise, known_noise  None, memory, or (seed, stream, sample_offset, 0): see parse_source
void step(py::handle device, py::handle stream, py::handle layout, py::handle table, py::handle index,
          py::handle ticket, py::handle x, py::handle m, py::handle uncond, py::handle guidance, py::handle clip,
          py::handle threshold, py::handle history, py::handle shift, py::handle noise, py::handle log_variance,
          py::handle mask, py::handle known, py::handle known_noise, py::handle y, py::handle x0, py::handle entry,
          py::handle model_input) {
  StepArguments a{};
  const int on = parse_device(device);
  const uint64_t queue = parse_seed(stream);
  if (!PyTuple_Check(layout.ptr()) || PyTuple_GET_SIZE(layout.ptr()) != 2)
    throw py::value_error("layout: expected (samples, elements of a sample)");
  a.samples = parse_integer("layout", PyTuple_GET_ITEM(layout.ptr(), 0));
  a.sample = parse_integer("layout", PyTuple_GET_ITEM(layout.ptr(), 1));
  // Bounds that keep products, and the groups of one thread each, countable.
  if (a.samples < 0 || a.sample < 0 || a.samples > int64_t(kMostGroups) ||
      __builtin_mul_overflow(a.samples, a.sample, &a.elements) || a.elements > int64_t(1) << 40)
    throw py::value_error("layout: needs sizes of at least 0, at most 2^32 - 256 samples, 2^40 elements in all");

  Reader read({});
  const Memory coefficients = parse_table(table, a.rows);
  if (coefficients.code != int(DType::f32) || a.rows == 0) throw py::value_error("table: must be float32, not empty");
  a.table = (const float*)coefficients.data;
  if (!index.is_none()) {
    const Indices found = parse_indices(index);
    if (found.count != 1 && found.count != a.samples) throw py::value_error("index: must be one, or one a sample");
    a.index = (int64_t*)found.data;
    a.index_stride = found.count != 1;
  } else {
    if (a.rows != 1 && a.rows != a.samples) throw py::value_error("table: without an index, one row, or one a sample");
    a.row_stride = a.rows != 1;
  }
  if (!ticket.is_none()) {
    const Indices found = parse_indices(ticket);
    if (found.count != 1) throw py::value_error("ticket: must be one int64");
    if (!a.index || a.index_stride) throw py::value_error("ticket: needs an index, one for all samples");
    a.ticket = (uint32_t*)found.data;
  }

  a.x = parse_data("x", x, a.elements);
  a.m = parse_data("m", m, a.elements);
  a.uncond = parse_optional_data("uncond", uncond, a.elements);
  a.guidance = parse_numbers("guidance", guidance, a.samples);
  a.clip = float(parse_clip(read, clip));
  a.threshold = threshold.is_none() ? Numbers{nullptr, 0, -1} : parse_numbers("threshold", threshold, a.samples);
  a.histories = count_history(read, history);
  a.shift = shift.ptr() == Py_True;
  for (int j = 0; j < a.histories; ++j) {
    const py::handle past = PyTuple_GET_ITEM(history.ptr(), j);
    a.history[j] = a.shift ? parse_kept("history", past, a.elements) : parse_data("history", past, a.elements);
    if (!a.history[j].data) throw py::value_error("history: None is no tensor");
  }
  a.noise = parse_source("noise", noise, a, true);
  a.log_variance = parse_optional_data("log_variance", log_variance, a.elements);
  a.known = parse_optional_data("known", known, a.elements);
  a.known_noise = parse_source("known_noise", known_noise, a, false);
  if (!mask.is_none()) {
    const Memory memory = parse_memory("mask", mask, 5);
    a.mask_inner = parse_integer("mask", PyTuple_GET_ITEM(mask.ptr(), 3));
    a.mask_stride = parse_integer("mask", PyTuple_GET_ITEM(mask.ptr(), 4));
    if (memory.code != int(DType::u8) && memory.code > int(DType::f16))
      throw py::value_error("mask: the dtype must be floating point, uint8 or bool");
    if (memory.code == int(DType::f64)) throw py::value_error("mask: must not be float64");
    if (a.mask_inner < 1 || (a.elements && a.sample % a.mask_inner)) throw py::value_error("mask: must repeat within a sample");
    if (a.mask_stride < 0 || a.mask_stride > int64_t(1) << 40) throw py::value_error("mask: its stride must be from 0 to 2^40");
    int64_t last;
    if (__builtin_mul_overflow(a.samples - 1, a.mask_stride, &last) || __builtin_add_overflow(last, a.mask_inner, &last) ||
        (a.elements && last > memory.elements))
      throw py::value_error("mask: its samples reach beyond its memory");
    // As one code for all sizes of it; an empty one is not absent.
    a.mask = {memory.elements ? memory.data : (void*)a.table, memory.code};
  }
  if (!a.mask.data != !a.known.data) throw py::value_error("mask: goes with known, both or neither");
  if (a.known_noise.kind != Noise::none && !a.mask.data) throw py::value_error("known_noise: goes with mask and known");
  a.y = parse_data("y", y, a.elements);
  if (a.y.code != a.x.code) throw py::value_error("y: must be of the dtype of x");
  a.x0 = parse_optional_data("x0", x0, a.elements);
  a.entry = parse_kept("entry", entry, a.elements);
  if (a.shift && (a.entry.data || !a.histories)) throw py::value_error("shift: the entry goes to the history");
  a.copies = 1;
  if (!model_input.is_none()) {
    a.copies = copies_in(model_input, a.elements);
    a.model_input = parse_data("model_input", model_input, a.copies * a.elements);
  }

  const bool vector = plan(a);
  if (a.groups == 0) {
    if (a.elements == 0) return;
    throw py::value_error("layout: too many elements for one launch");
  }
  const int error = launch(a, vector, on, (void*)queue);
  if (error)
    throw std::runtime_error("the CUDA step was not launched: " + std::string(error_text(error)) + " (CUDA error " +
                             std::to_string(error) + ", device " + std::to_string(on) + ").");
}

void load_on(py::handle device) {
  const int on = parse_device(device);
  const int error = load(on);
  if (error)
    throw std::runtime_error("the CUDA kernels cannot be loaded: " + std::string(error_text(error)) + " (CUDA error " +
                             std::to_string(error) + ", device " + std::to_string(on) + ").");
}

}  // namespace

void bind(py::module_& module) {
  module.def("cuda_step", step);
  module.def("cuda_load", load_on);
}

}  // namespace cuda
}  // namespace fastdiff
