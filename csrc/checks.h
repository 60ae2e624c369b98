// From Python's arguments to the kernels'. Everything that comes in passes through here: what gets past is safe to run,
// as far as a pointer with a size can be.
//
//   tensor   (pointer, dtype code, number of elements), contiguous in memory order; None: absent
//   rows     a tensor in the compute dtype with one element, or one a row
//   noise    a tensor, or (seed, stream, sample_offset, offset) to make it from
//   mask     (pointer, dtype code, number of elements, sizes, strides): sizes of all elements, strides in elements
//   layout   (outer, shared, frames, inner, samples, channels), see Layout
//
// Anything unfit raises ValueError and names the argument.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/arguments.h"

namespace fastdiff {

namespace py = pybind11;

struct Memory {
  void* data;
  int code;
  int64_t elements;
};

// (pointer, dtype code, number of elements, ...) of `fields` fields, of any dtype: a pointer that is not null unless
// there are no elements.
Memory parse_memory(const char* name, py::handle value, int64_t fields = 3);

Layout parse_layout(py::handle value);

Input parse_input(const char* name, py::handle value, int64_t elements);
Input parse_optional_input(const char* name, py::handle value, int64_t elements);
Output parse_output(const char* name, py::handle value, int64_t elements);
Output parse_optional_output(const char* name, py::handle value, int64_t elements);

// An output that must be of the dtype given.
Output parse_optional_output(const char* name, py::handle value, int64_t elements, DType dtype);

// Rows decide the compute dtype: the first that is parsed sets `wide`, the others must agree.
struct RowParser {
  const Layout& layout;
  bool known = false, wide = false;

  Rows required(const char* name, py::handle value, int columns = 1);
  Rows optional(const char* name, py::handle value);
  DType dtype() const { return wide ? DType::f64 : DType::f32; }
};

Noise parse_noise(const char* name, py::handle value, const Layout& layout);
Noise parse_optional_noise(const char* name, py::handle value, const Layout& layout);
Mask parse_optional_mask(py::handle value, const Layout& layout);

// A code from 0 to count - 1.
int parse_code(const char* name, py::handle value, int count);
int parse_threads(py::handle value);
uint64_t parse_seed(py::handle value);
int64_t parse_integer(const char* name, py::handle value);
double parse_number(const char* name, py::handle value);

// int64 numbers in memory: (pointer, code 5, number of elements).
struct Indices {
  const int64_t* data;
  int64_t count;
};
Indices parse_indices(py::handle value);

}  // namespace fastdiff
