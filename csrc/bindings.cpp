// fastdiff._C: the operations on pointers and sizes. It needs no torch to be built, and knows none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "coefficients.h"
#include "cpu/table.h"
#include "fast_calls.h"
#include "fastcall.h"
#include "gpu_launch.h"
#include "operations.h"
#include "philox.h"
#include "step_table.h"
#include "schedulers.h"
#include "trajectory.h"
#ifdef FASTDIFF_CUDA
#include "cuda/binding.h"
#endif

namespace fastdiff {

namespace {

void normal(py::handle layout, py::handle source, py::handle window, py::handle out, py::handle threads) {
  NormalArguments a{};
  a.layout = parse_layout(layout);
  a.noise = parse_noise("source", source, a.layout);
  if (a.noise.kind != Noise::made) throw py::value_error("source: expected (seed, stream, samples, offset)");
  if (given(window)) {
    if (a.noise.offset != 0) throw py::value_error("window: goes with no offset");
    a.window = parse_window(window, a.layout);
  }
  a.out = parse_output("out", out, a.layout.elements);
  const int team = parse_threads(threads);
  const Unlocked unlocked(a.layout);
  run(a, team);
}

void uniform(py::handle seed, py::handle stream, py::handle samples, py::handle out, py::handle number) {
  const Memory to = parse_memory("out", out);
  if (to.code != int(DType::f64)) throw py::value_error("out: must be float64");
  const Uniforms made = parse_uniforms(seed, stream, samples, to.elements, parse_integer("number", number));
  made.make(0, made.count, (double*)to.data);
}

// An operation in the general way: layout, its operands in their order, threads.
template <class Operands>
constexpr int kOperands = sizeof(Operands) / sizeof(PyObject*);

template <class Operands, class Arguments>
py::object general(PyObject* const* a) {
  Operands from;
  std::memcpy(&from, a + 1, sizeof(from));
  Reader read(parse_layout(a[0]));
  Arguments call{};
  fill(read, from, call);
  run_unlocked(read, call, parse_threads(a[1 + kOperands<Operands>]));
  return py::none();
}

template <class Operands, class Arguments>
constexpr PyMethodDef general_method(const char* name) {
  return fast_method<general<Operands, Arguments>, kOperands<Operands> + 2>(name);
}

PyMethodDef methods[] = {general_method<NoiseOperands, NoiseArguments>("noise"),
                         general_method<ConvertOperands, ConvertArguments>("convert"),
                         general_method<LossOperands, LossCall>("loss"),
                         general_method<GaussianOperands, GaussianCall>("gaussian_kl"),
                         general_method<PosteriorOperands, PosteriorArguments>("posterior"),
                         general_method<PosteriorGradientOperands, PosteriorGradientArguments>("posterior_gradient"),
                         general_method<KLNormalOperands, KLNormalCall>("kl_normal"),
                         general_method<MomentsOperands, MomentsCall>("row_moments"),
                         general_method<MomentsGradientOperands, MomentsGradientArguments>("row_moments_gradient"),
                         general_method<StepOperands, StepArguments>("step"),
                         {nullptr, nullptr, 0, nullptr}};

py::list simd_names() {
  py::list names;
  int count;
  const Variant* all = variants(count);
  for (int k = 0; k < count; ++k)
    if (all[k].supported()) names.append(all[k].name);
  return names;
}

void set_simd(const std::string& name) {
  if (!choose(name.c_str())) throw py::value_error("simd: " + name + " is unknown, or this machine lacks it");
}

// The compute capabilities that there is machine code for, 10 major + minor; empty where built without nvcc.
py::tuple cuda_architectures() {
#ifdef FASTDIFF_CUDA
  return py::make_tuple(FASTDIFF_CUDA);
#else
  return py::tuple();
#endif
}

}  // namespace

}  // namespace fastdiff

PYBIND11_MODULE(_C, module) {
  using namespace fastdiff;
  module.doc() = "fastdiff's operations on the CPU, and a step in CUDA, on pointers and sizes; see csrc/checks.h for the arguments.";
  py::dict codes;
#define FASTDIFF_NAME(name) #name,
  codes["columns"] = std::vector<std::string>{FASTDIFF_COLUMNS(FASTDIFF_NAME)};
  codes["functions"] = std::vector<std::string>{FASTDIFF_FUNCTIONS(FASTDIFF_NAME)};
  codes["reductions"] = std::vector<std::string>{FASTDIFF_REDUCTIONS(FASTDIFF_NAME)};
  codes["normalizations"] = std::vector<std::string>{FASTDIFF_NORMALIZATIONS(FASTDIFF_NAME)};
  codes["moments"] = std::vector<std::string>{FASTDIFF_MOMENTS(FASTDIFF_NAME)};
  codes["operations"] = std::vector<std::string>{FASTDIFF_OPERATIONS(FASTDIFF_NAME)};
  codes["dtypes"] = std::vector<std::string>{FASTDIFF_DTYPES(FASTDIFF_NAME) "i64"};
#undef FASTDIFF_NAME
  std::vector<std::string> needing;
#define FASTDIFF_NEEDS(name) if (needs_c(Function::name)) needing.push_back(#name);
  FASTDIFF_FUNCTIONS(FASTDIFF_NEEDS)
#undef FASTDIFF_NEEDS
  codes["need_c"] = needing;
  codes["offset_stream"] = philox::kOffsetStream;
  codes["kept_steps"] = kHistory;
  module.attr("codes") = codes;
  module.attr("sources") = FASTDIFF_SOURCES;  // a digest of them: see fastdiff/extension.py
  module.def("normal", normal);
  module.def("uniform", uniform);
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
  bind_coefficients(module);
  bind_fast_calls(module);
  bind_trajectory(module);
  bind_step_table(module);
  bind_schedulers(module);
  bind_gpu_launch(module);
  module.def("simd", [] { return chosen().name; });
  module.def("simd_variants", simd_names);
  module.def("set_simd", set_simd);
  module.def("cuda_architectures", cuda_architectures);
#ifdef FASTDIFF_CUDA
  cuda::bind(module);
#endif
}
