// Coefficient programs (fastdiff/program.py): they compute the coefficients of a row from its time, or a time from a uniform.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

#include "checks.h"

namespace fastdiff {

struct Instruction {
  int operation;
  int operands[3];  // registers; of `number` the place, of `lookup` a register and a column
};

struct Program {
  std::vector<Instruction> code;  // register k is what instruction k computes; the first is the input
  std::vector<double> numbers;
  std::vector<int> outputs;
  std::vector<double> table;  // [height, width]
  int64_t height;
  int width;
  bool index;        // the input is an integer,
  bool table_rows;   // and the outputs are just the row of the table that it names
  double low, high;  // of the input

  bool allows(double input) const { return input >= low && input <= high && input < __builtin_inf(); }
};

// The program in a capsule that `coefficient_program` made. Raises TypeError or ValueError for another object, and for a
// program with another number of outputs.
const Program& program_of(PyObject* capsule, int outputs);

// Runs the program on each of `rows` inputs. Output k of row r is out[k * rows + r], in float64 if `wide`, rounded to
// float32 otherwise.
void evaluate(const Program& program, const double* inputs, int64_t rows, bool wide, void* out);

// Uniforms in (0, 1): `each` of one sample after the other.
struct Uniforms {
  uint64_t seed;
  uint32_t stream;
  Samples samples;
  int64_t count, each;  // of all samples, and of one

  void make(int64_t first, int64_t number, double* u) const;
};

// `count` numbers for `number` samples, as many for each. Raises ValueError where they do not divide it.
Uniforms parse_uniforms(py::handle seed, py::handle stream, py::handle samples, int64_t count, int64_t number);

// Runs the program on each uniform: float64 results, or int64 if `index`.
void draw(const Program& program, const Uniforms& uniforms, bool index, void* out);

void bind_coefficients(pybind11::module_& module);

}  // namespace fastdiff
