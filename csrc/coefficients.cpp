#include "coefficients.h"

#include <cmath>
#include <memory>

#include "philox.h"

namespace fastdiff {

namespace {

enum Operation {
#define FASTDIFF_NAME(name) op_##name,
  FASTDIFF_OPERATIONS(FASTDIFF_NAME)
#undef FASTDIFF_NAME
  kOperations
};

#define FASTDIFF_ONE(name) +1
constexpr int kOfNone = FASTDIFF_OPERATIONS_0(FASTDIFF_ONE);
constexpr int kOfOne = kOfNone FASTDIFF_OPERATIONS_1(FASTDIFF_ONE);
constexpr int kOfTwo = kOfOne FASTDIFF_OPERATIONS_2(FASTDIFF_ONE);
#undef FASTDIFF_ONE

constexpr const char* kProgramName = "fastdiff.coefficients";
constexpr int kMostRegisters = 256, kMostNumbers = 256, kMostOutputs = 16;
constexpr int kRegisters = 4096;  // numbers that all registers of a block of rows have room for

template <int count>
double polynomial(double x, const double (&c)[count]) {
  double value = c[0];
  for (int k = 1; k < count; ++k) value = value * x + c[k];
  return value;
}

// The quantile function of the normal distribution: Moshier's Cephes, ndtri, as PyTorch has it.
double ndtri(double u) {
  static const double p0[] = {-5.99633501014107895267E1, 9.80010754185999661536E1, -5.66762857469070293439E1,
                              1.39312609387279679503E1, -1.23916583867381258016E0};
  static const double q0[] = {1.0, 1.95448858338141759834E0, 4.67627912898881538453E0, 8.63602421390890590575E1,
                              -2.25462687854119370527E2, 2.00260212380060660359E2, -8.20372256168333339912E1,
                              1.59056225126211695515E1, -1.18331621121330003142E0};
  static const double p1[] = {4.05544892305962419923E0, 3.15251094599893866154E1, 5.71628192246421288162E1,
                              4.40805073893200834700E1, 1.46849561928858024014E1, 2.18663306850790267539E0,
                              -1.40256079171354495875E-1, -3.50424626827848203418E-2, -8.57456785154685413611E-4};
  static const double q1[] = {1.0, 1.57799883256466749731E1, 4.53907635128879210584E1, 4.13172038254672030440E1,
                              1.50425385692907503408E1, 2.50464946208309415979E0, -1.42182922854787788574E-1,
                              -3.80806407691578277194E-2, -9.33259480895457427372E-4};
  static const double p2[] = {3.23774891776946035970E0, 6.91522889068984211695E0, 3.93881025292474443415E0,
                              1.33303460815807542389E0, 2.01485389549179081538E-1, 1.23716634817820021358E-2,
                              3.01581553508235416007E-4, 2.65806974686737550832E-6, 6.23974539184983293730E-9};
  static const double q2[] = {1.0, 6.02427039364742014255E0, 3.67983563856160859403E0, 1.37702099489081330271E0,
                              2.16236993594496635890E-1, 1.34204006088543189037E-2, 3.28014464682127739104E-4,
                              2.89247864745380683936E-6, 6.79019408009981274425E-9};
  if (u == 0) return -HUGE_VAL;
  if (u == 1) return HUGE_VAL;
  if (!(u > 0 && u < 1)) return NAN;
  const bool upper = u > 1 - 0.13533528323661269189;  // exp(-2)
  const double y = upper ? 1 - u : u;
  if (y > 0.13533528323661269189) {
    const double from = y - 0.5, square = from * from;
    return (from + from * (square * polynomial(square, p0) / polynomial(square, q0))) * 2.50662827463100050242;
  }
  const double x = std::sqrt(-2 * std::log(y)), first = x - std::log(x) / x, z = 1 / x;
  const double rest = x < 8 ? z * polynomial(z, p1) / polynomial(z, q1) : z * polynomial(z, p2) / polynomial(z, q2);
  return upper ? first - rest : rest - first;
}

double sign(double x) { return double(x > 0) - double(x < 0); }
double larger(double a, double b) { return a != a ? a : b != b ? b : a < b ? b : a; }
double smaller(double a, double b) { return a != a ? a : b != b ? b : b < a ? b : a; }

// One operation for a block of rows.
void run(const Program& program, const Instruction& i, const double* a, const double* b, const double* c, double* out,
         int rows) {
#define FASTDIFF_EACH(name, value)                  \
  case op_##name:                                   \
    for (int r = 0; r < rows; ++r) out[r] = value; \
    break
  switch (i.operation) {
    case op_lookup:
      for (int r = 0; r < rows; ++r)
        out[r] = a[r] >= 0 && a[r] < double(program.height)
                     ? program.table[size_t(int64_t(a[r]) * program.width + i.operands[1])]
                     : NAN;
      break;
    FASTDIFF_EACH(neg, -a[r]);
    FASTDIFF_EACH(abs, std::fabs(a[r]));
    FASTDIFF_EACH(sign, sign(a[r]));
    FASTDIFF_EACH(sqrt, std::sqrt(a[r]));
    FASTDIFF_EACH(reciprocal, 1 / a[r]);
    FASTDIFF_EACH(exp, std::exp(a[r]));
    FASTDIFF_EACH(log, std::log(a[r]));
    FASTDIFF_EACH(expm1, std::expm1(a[r]));
    FASTDIFF_EACH(log1p, std::log1p(a[r]));
    FASTDIFF_EACH(sin, std::sin(a[r]));
    FASTDIFF_EACH(cos, std::cos(a[r]));
    FASTDIFF_EACH(tan, std::tan(a[r]));
    FASTDIFF_EACH(atan, std::atan(a[r]));
    FASTDIFF_EACH(tanh, std::tanh(a[r]));
    FASTDIFF_EACH(sigmoid, 1 / (1 + std::exp(-a[r])));
    FASTDIFF_EACH(erf, std::erf(a[r]));
    FASTDIFF_EACH(ndtri, ndtri(a[r]));
    FASTDIFF_EACH(floor, std::floor(a[r]));
    FASTDIFF_EACH(ceil, std::ceil(a[r]));
    FASTDIFF_EACH(trunc, std::trunc(a[r]));
    FASTDIFF_EACH(isnan, a[r] != a[r]);
    FASTDIFF_EACH(isinf, std::fabs(a[r]) == HUGE_VAL);
    FASTDIFF_EACH(not, a[r] == 0);
    FASTDIFF_EACH(add, a[r] + b[r]);
    FASTDIFF_EACH(sub, a[r] - b[r]);
    FASTDIFF_EACH(mul, a[r] * b[r]);
    FASTDIFF_EACH(div, a[r] / b[r]);
    FASTDIFF_EACH(pow, std::pow(a[r], b[r]));
    FASTDIFF_EACH(hypot, std::hypot(a[r], b[r]));
    FASTDIFF_EACH(maximum, larger(a[r], b[r]));
    FASTDIFF_EACH(minimum, smaller(a[r], b[r]));
    FASTDIFF_EACH(eq, a[r] == b[r]);
    FASTDIFF_EACH(lt, a[r] < b[r]);
    FASTDIFF_EACH(le, a[r] <= b[r]);
    FASTDIFF_EACH(and, a[r] != 0 && b[r] != 0);
    FASTDIFF_EACH(or, a[r] != 0 || b[r] != 0);
    FASTDIFF_EACH(where, a[r] != 0 ? b[r] : c[r]);
  }
#undef FASTDIFF_EACH
}

int parse_operand(py::handle value, int64_t count) {
  const int64_t operand = parse_integer("code", value);
  if (operand < 0 || operand >= count) throw py::value_error("code: an operand is out of range");
  return int(operand);
}

// (code, numbers, outputs, (pointer, float64, numbers) of the table or None, height, width, index, low, high): a capsule
// with a copy of them. code: (operation, a, b, c) for each register.
py::capsule make_program(py::tuple code, py::tuple numbers, py::tuple outputs, py::handle table, py::handle height,
                         py::handle width, bool index, py::handle low, py::handle high) {
  auto program = std::make_unique<Program>();
  const int registers = int(code.size());
  if (registers < 1 || registers > kMostRegisters || numbers.size() > kMostNumbers)
    throw py::value_error("code: must have from 1 to 256 registers, and as many numbers");
  for (py::handle number : numbers) program->numbers.push_back(parse_number("numbers", number));
  program->height = parse_integer("height", height);
  const int64_t columns = parse_integer("width", width);
  if (program->height < 0 || program->height > (int64_t(1) << 40) || columns < 0 || columns > kMostOutputs)
    throw py::value_error("table: must have at most 2^40 rows and 16 columns");
  program->width = int(columns);
  if (!table.is_none()) {
    const Input held = parse_input("table", table, program->height * columns);
    if (held.dtype != DType::f64) throw py::value_error("table: must be float64");
    program->table.assign((const double*)held.data, (const double*)held.data + program->height * columns);
  } else if (program->height) {
    throw py::value_error("table: is needed for its height");
  }
  for (int k = 0; k < registers; ++k) {
    if (!PyTuple_Check(code[k].ptr()) || PyTuple_GET_SIZE(code[k].ptr()) != 4)
      throw py::value_error("code: expected (operation, a, b, c)");
    const py::tuple fields = code[k];
    Instruction i{parse_code("code", fields[0], kOperations), {0, 0, 0}};
    if ((i.operation == op_input) != (k == 0)) throw py::value_error("code: the input is the first register");
    if (i.operation == op_number) {
      i.operands[0] = parse_operand(fields[1], int64_t(numbers.size()));
    } else if (i.operation == op_lookup) {
      i.operands[0] = parse_operand(fields[1], k);
      i.operands[1] = parse_operand(fields[2], program->height ? columns : 0);
    } else if (i.operation != op_input) {
      const int count = i.operation < kOfOne ? 1 : i.operation < kOfTwo ? 2 : 3;
      for (int o = 0; o < count; ++o) i.operands[o] = parse_operand(fields[size_t(o) + 1], k);
    }
    program->code.push_back(i);
  }
  if (outputs.size() < 1 || outputs.size() > kMostOutputs) throw py::value_error("outputs: must be from 1 to 16");
  for (py::handle output : outputs) program->outputs.push_back(parse_operand(output, registers));
  program->index = index;
  program->table_rows = index && program->outputs.size() == size_t(columns);
  for (int k = 0; k < int(program->outputs.size()) && program->table_rows; ++k) {
    const Instruction& i = program->code[size_t(program->outputs[size_t(k)])];
    program->table_rows = i.operation == op_lookup && i.operands[0] == 0 && i.operands[1] == k;
  }
  program->low = parse_number("low", low);
  program->high = parse_number("high", high);
  return py::capsule(program.release(), kProgramName, [](void* made) { delete (Program*)made; });
}

// coefficients(program, outputs, times, out): what it computes at `times`, (pointer, dtype, number), into `out`,
// (pointer, float32 or float64, outputs * number). Returns whether all times are in range; nothing is written if not.
bool coefficients(py::handle capsule, py::handle outputs, py::handle times, py::handle to) {
  const Program& program = program_of(capsule.ptr(), int(parse_integer("outputs", outputs)));
  const Memory t = parse_memory("times", times);
  const bool integers = t.code == kInt64;
  if (!integers && t.code != int(DType::f32) && t.code != int(DType::f64))
    throw py::value_error("times: must be int64, float32 or float64");
  if (integers != program.index) throw py::value_error("times: of the wrong dtype for this program");
  int64_t results;
  if (__builtin_mul_overflow(t.elements, int64_t(program.outputs.size()), &results))
    throw py::value_error("times: too many");
  const Output out = parse_output("out", to, results);
  if (out.dtype != DType::f32 && out.dtype != DType::f64) throw py::value_error("out: must be float32 or float64");
  std::unique_ptr<double[]> held(new double[size_t(t.elements) + 1]);
  for (int64_t r = 0; r < t.elements; ++r) {
    held[r] = integers ? double(((const int64_t*)t.data)[r])
              : t.code == int(DType::f64) ? ((const double*)t.data)[r] : double(((const float*)t.data)[r]);
    if (!program.allows(held[r])) return false;
  }
  evaluate(program, held.get(), t.elements, out.dtype == DType::f64, out.data);
  return true;
}

// times(program, out, seed, stream, samples, number of them): see `draw`. out: (pointer, float64 or int64, elements).
void times(py::handle capsule, py::handle to, py::handle seed, py::handle stream, py::handle samples, py::handle number) {
  const Program& program = program_of(capsule.ptr(), 1);
  const Memory out = parse_memory("out", to);
  if (out.code != int(DType::f64) && out.code != kInt64) throw py::value_error("out: must be float64 or int64");
  const int64_t count = parse_integer("number", number);
  draw(program, parse_uniforms(seed, stream, samples, out.elements, count), out.code == kInt64, out.data);
}

}  // namespace

const Program& program_of(PyObject* capsule, int outputs) {
  if (!PyCapsule_IsValid(capsule, kProgramName)) throw py::type_error("expected what coefficient_program made");
  const auto* program = (const Program*)PyCapsule_GetPointer(capsule, kProgramName);
  if (int(program->outputs.size()) != outputs) throw py::value_error("program: computes another number of things");
  return *program;
}

namespace {

void put(void* out, int64_t place, double value, bool wide) {
  if (wide)
    ((double*)out)[place] = value;
  else
    ((float*)out)[place] = float(value);
}

void copy_rows(const Program& program, const double* inputs, int64_t rows, bool wide, void* out) {
  for (int64_t r = 0; r < rows; ++r) {
    const bool inside = inputs[r] >= 0 && inputs[r] < double(program.height);
    const double* row = program.table.data() + (inside ? int64_t(inputs[r]) : 0) * program.width;
    for (int k = 0; k < program.width; ++k) put(out, k * rows + r, inside ? row[k] : NAN, wide);
  }
}

}  // namespace

void evaluate(const Program& program, const double* inputs, int64_t rows, bool wide, void* out) {
  if (program.table_rows) return copy_rows(program, inputs, rows, wide, out);
  double registers[kRegisters];
  const int count = int(program.code.size());
  const int64_t room = kRegisters / count;
  const int64_t block = rows < room ? rows : room;
  for (int64_t first = 0; first < rows; first += block) {
    const int now = int(rows - first < block ? rows - first : block);
    for (int r = 0; r < now; ++r) registers[r] = inputs[first + r];
    for (int k = 1; k < count; ++k) {
      const Instruction& i = program.code[size_t(k)];
      double* result = registers + k * block;
      if (i.operation == op_number) {
        const double value = program.numbers[size_t(i.operands[0])];
        for (int r = 0; first == 0 && r < block; ++r) result[r] = value;
        continue;
      }
      run(program, i, registers + i.operands[0] * block, registers + i.operands[1] * block,
          registers + i.operands[2] * block, result, now);
    }
    for (size_t k = 0; k < program.outputs.size(); ++k) {
      const double* found = registers + program.outputs[k] * block;
      for (int r = 0; r < now; ++r) put(out, int64_t(k) * rows + first + r, found[r], wide);
    }
  }
}

void Uniforms::make(int64_t first, int64_t number, double* u) const {
  if (number == 0) return;
  int64_t sample = first / each, k = first % each;
  philox::Words words{};
  for (int64_t place = 0; place < number; ++place) {
    if (place == 0 || k % 2 == 0) words = philox::words(seed, uint32_t(k / 2), stream, samples[sample]);
    u[place] = philox::uniform(words, k % 2);
    if (++k == each) k = 0, ++sample;
  }
}

Uniforms parse_uniforms(py::handle seed, py::handle stream, py::handle samples, int64_t count, int64_t number) {
  if (number < 0 || (number ? count % number != 0 : count != 0)) refuse("number", "the samples do not divide the uniforms");
  const int64_t each = number ? count / number : 0;
  if (each > int64_t(1) << 33) refuse("number", "at most 2^33 uniforms can be made for a sample");
  return {parse_seed(seed), parse_stream(stream), parse_samples(samples, number), count, each};
}

void draw(const Program& program, const Uniforms& uniforms, bool index, void* out) {
  constexpr int64_t kBlock = 64;
  const int64_t count = uniforms.count;
  double u[kBlock], t[kBlock];
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t now = count - start < kBlock ? count - start : kBlock;
    uniforms.make(start, now, u);
    evaluate(program, u, now, true, t);
    for (int64_t k = 0; k < now; ++k) {
      if (index)
        ((int64_t*)out)[start + k] = t[k] >= 0 && t[k] < 0x1p62 ? int64_t(t[k]) : -1;
      else
        ((double*)out)[start + k] = t[k];
    }
  }
}

void bind_coefficients(py::module_& module) {
  module.def("times", times);
  module.def("coefficient_program", make_program);
  module.def("coefficients", coefficients);
}

}  // namespace fastdiff
