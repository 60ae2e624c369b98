// Coefficient programs (fastdiff/program.py): where the numbers of a row come from, by its time, or by a uniform.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <vector>

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

// That of a capsule which `coefficient_program` made; raises TypeError or ValueError for another, or one that computes
// another number of things.
const Program& program_of(PyObject* capsule, int outputs);

// What the program computes for each of `rows` inputs: output k of row r is out[k * rows + r], in float64 if `wide`,
// rounded to float32 otherwise.
void evaluate(const Program& program, const double* inputs, int64_t rows, bool wide, void* out);

// What the program makes of a uniform u in (0, 1) a sample, from sample `first` on: float64, or int64 if `index`.
void draw(const Program& program, uint64_t seed, uint32_t stream, uint64_t first, int64_t count, bool index, void* out);

void bind_coefficients(pybind11::module_& module);

}  // namespace fastdiff
