// From Python's arguments to the kernels'. Everything that comes in passes through here: what gets past is safe to run,
// as far as a pointer with a size can be.
//
//   tensor   (pointer, dtype code, number of elements), contiguous in memory order; None: absent
//   image    a tensor, or one of uint8
//   rows     a tensor in the compute dtype with one element, or one a row
//   samples  the index of the first, or int64 numbers: of each
//   noise    a tensor, or (seed, stream, samples, offset) to make it from
//   mask     (pointer, dtype code, number of elements, sizes, strides): sizes of all elements, strides in elements
//   order    (sizes, strides) of full-size data that lies in memory without gaps, in another order; None: contiguous
//   window   (place of the first element, sizes, strides): where a slice of a sample lies in the whole one
//   layout   (outer, shared, frames, inner, samples, channels), see Layout; or, of sequences one after another, the
//            memory of int64 numbers: where each starts, in elements, and where the last ends
//
// Anything unfit raises ValueError and names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/arguments.h"

namespace fastdiff {

namespace py = pybind11;

[[noreturn]] void refuse(const char* name, const std::string& why);

struct Memory {
  void* data;
  int code;
  int64_t elements;
};

// (pointer, dtype code, number of elements, ...) of `fields` fields, of any dtype: a pointer that is not null unless
// there are no elements.
Memory parse_memory(const char* name, py::handle value, int64_t fields = 3);

// A code from 0 to count - 1.
int parse_code(const char* name, py::handle value, int count);
int parse_threads(py::handle value);
uint64_t parse_seed(py::handle value);
uint32_t parse_stream(py::handle value);
Samples parse_samples(py::handle value, int64_t count);
int64_t parse_integer(const char* name, py::handle value);
double parse_number(const char* name, py::handle value);

Layout parse_layout(py::handle value);
Layout layout_of_sequences(const Memory& starts);
Input parse_input(const char* name, py::handle value, int64_t elements, bool image = false);
Output parse_output(const char* name, py::handle value, int64_t elements);
Noise parse_noise(const char* name, py::handle value, const Layout& layout);
Mask parse_mask(py::handle value, const Layout& layout);
// The strides at which so many elements lie in memory of so many. Neighbouring dimensions that one stride goes through
// become one; of one element there is one dimension. Sizes and strides are at least 0. Returns why they do not fit, or
// null.
const char* find_strides(const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t most, int64_t memory, Strides& at);
Order parse_order(py::handle value, const Layout& layout);
Window parse_window(py::handle value, const Layout& layout);

// Whether there is an object: neither null nor None.
inline bool given(py::handle value) { return value && !value.is_none(); }

constexpr int kMostDims = 64;  // of a tensor of PyTorch

// Reads the operands of a call. This one reads memory, and raises for what is unfit; tensors::Reader reads PyTorch's
// tensors. A null operand, or None for an optional one, leaves the field as it is.
class Reader {
 public:
  Layout layout;
  bool known, wide;  // whether the compute dtype is known, and is float64

  explicit Reader(const Layout& of, bool known = false, bool wide = false) : layout(of), known(known), wide(wide) {}
  DType compute() const { return wide ? DType::f64 : DType::f32; }

  void input(const char* name, py::handle value, Input& to) {
    if (value) to = parse_input(name, value, layout.elements);
  }
  // Data that may be an image of bytes.
  void image(const char* name, py::handle value, Input& to) {
    if (value) to = parse_input(name, value, layout.elements, true);
  }
  void noise(const char* name, py::handle value, Noise& to) {
    if (value) to = parse_noise(name, value, layout);
  }
  void mask(py::handle value, Mask& to) { to = parse_mask(value, layout); }
  // The first rows decide the compute dtype, the others must agree.
  void rows(const char* name, py::handle value, Rows& to, int columns = 1);
  double number(const char* name, py::handle value) { return parse_number(name, value); }
  [[noreturn]] void refuse(const char* name, const char* why) { fastdiff::refuse(name, why); }
};

void optional_output(const char* name, py::handle value, int64_t elements, Output& to);
void optional_output(const char* name, py::handle value, int64_t elements, Output& to, DType dtype);

// A bound of x0; -1 for None.
template <class Reader>
double parse_clip(Reader& read, py::handle value) {
  if (value.is_none()) return -1;
  const double bound = read.number("clip", value);
  if (!(bound > 0)) read.refuse("clip", "must be above 0, or None");
  return bound;
}

// A weighted sum of error functions: the strength of each, then the constants of those that have one, None for the row's.
// Returns whether a row's is used.
template <class Reader>
bool parse_combination(Reader& read, PyObject* value, Combination& to) {
  int at = kFunctions;
  bool of_row = false;
  for (int k = 0; k < kFunctions; ++k) at += needs_c(Function(k));
  if (PyTuple_GET_SIZE(value) != at) return read.refuse("function", "expected strengths and constants"), false;
  at = kFunctions;
  for (int k = 0; k < kFunctions; ++k) {
    to.strengths[k] = read.number("function", PyTuple_GET_ITEM(value, k));
    to.constants[k] = 1;
    to.of_row[k] = false;
    if (!needs_c(Function(k))) continue;
    PyObject* const constant = PyTuple_GET_ITEM(value, at++);
    to.of_row[k] = constant == Py_None;
    if (!to.of_row[k]) to.constants[k] = read.number("function", constant);
    of_row = of_row || (to.of_row[k] && to.strengths[k] != 0);
  }
  return of_row;
}

// How many entries a tuple has.
template <class Reader>
int count_history(Reader& read, py::handle value) {
  if (PyTuple_Check(value.ptr()) && PyTuple_GET_SIZE(value.ptr()) <= kHistory) return int(PyTuple_GET_SIZE(value.ptr()));
  read.refuse("history", "expected a tuple of at most 4 tensors");
  return 0;
}

// The steps of a run, float32 or float64, and how many there are.
Memory parse_table(py::handle value, int64_t& rows);

// How many copies of the elements a model input has room for.
int copies_in(py::handle model_input, int64_t elements);

// int64 numbers in memory: (pointer, code 5, number of elements).
struct Indices {
  const int64_t* data;
  int64_t count;
};
Indices parse_indices(py::handle value);

}  // namespace fastdiff
