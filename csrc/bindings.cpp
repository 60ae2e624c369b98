// fastdiff._C: the operations on pointers and sizes. It needs no torch to be built, and knows none.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <string>
#include <vector>

#include "checks.h"
#include "coefficients.h"
#include "cpu/run.h"
#include "cpu/table.h"
#include "fast_calls.h"
#include "philox.h"
#include "step_table.h"
#include "schedulers.h"
#include "trajectory.h"
#include "unlocked.h"
#ifdef FASTDIFF_CUDA
#include "cuda/binding.h"
#endif

namespace fastdiff {

namespace {

void normal(py::handle layout, py::handle source, py::handle out, py::handle threads) {
  NormalArguments a{};
  a.layout = parse_layout(layout);
  a.noise = parse_noise("source", source, a.layout);
  if (a.noise.kind != Noise::made) throw py::value_error("source: expected (seed, stream, sample_offset, offset)");
  a.out = parse_output("out", out, a.layout.elements);
  const int team = parse_threads(threads);
  const Unlocked unlocked(a.layout);
  run(a, team);
}

void uniform(py::handle seed, py::handle stream, py::handle sample_offset, py::handle out, py::handle samples) {
  const uint64_t key = parse_seed(seed), first = uint64_t(parse_integer("sample_offset", sample_offset));
  const int64_t word = parse_integer("stream", stream), count = parse_integer("samples", samples);
  if (word < 0 || word > UINT32_MAX) throw py::value_error("stream: must have 32 bits");
  const Output to = parse_optional_output("out", out, count, DType::f64);
  if (!to.data) throw py::value_error("out: is needed");
  for (int64_t k = 0; k < count; ++k)
    ((double*)to.data)[k] = philox::uniform(philox::words(key, 0, uint32_t(word), first + uint64_t(k)));
}

void noise(py::handle layout, py::handle x0, py::handle alpha, py::handle sigma, py::handle n, py::handle perturbation,
           py::handle xi, py::handle x_t, py::handle keep, py::handle threads) {
  NoiseArguments a{};
  a.layout = parse_layout(layout);
  RowParser rows{a.layout};
  a.x0 = parse_input("x0", x0, a.layout.elements);
  a.alpha = rows.required("alpha", alpha);
  a.sigma = rows.required("sigma", sigma);
  a.n = parse_noise("n", n, a.layout);
  a.perturbation = parse_number("perturbation", perturbation);
  a.xi = parse_optional_noise("xi", xi, a.layout);
  a.x_t = parse_optional_output("x_t", x_t, a.layout.elements);
  a.keep = parse_optional_output("keep", keep, a.layout.elements, rows.dtype());
  const int team = parse_threads(threads);
  const Unlocked unlocked(a.layout);
  run(a, rows.wide, team);
}

void convert(py::handle layout, py::handle m, py::handle x_t, py::handle k_x, py::handle k_m, py::handle out,
             py::handle threads) {
  ConvertArguments a{};
  a.layout = parse_layout(layout);
  RowParser rows{a.layout};
  a.m = parse_input("m", m, a.layout.elements);
  a.x_t = parse_input("x_t", x_t, a.layout.elements);
  a.k_x = rows.required("k_x", k_x);
  a.k_m = rows.required("k_m", k_m);
  a.out = parse_output("out", out, a.layout.elements);
  const int team = parse_threads(threads);
  const Unlocked unlocked(a.layout);
  run(a, rows.wide, team);
}

void loss(py::handle layout, py::handle prediction, py::handle x0, py::handle n, py::handle p, py::handle q,
          py::handle scale, py::handle weight, py::handle c, py::handle mask, py::handle y, py::handle r,
          py::handle function, py::handle normalization, py::handle reduction, py::handle upstream, py::handle result, py::handle means,
          py::handle gradient, py::handle threads) {
  LossCall call{};
  LossArguments& a = call.kernel;
  a.layout = parse_layout(layout);
  const int64_t elements = a.layout.elements;
  RowParser rows{a.layout};
  a.weight = rows.required("weight", weight);
  a.prediction = parse_input("prediction", prediction, elements);
  a.p = rows.optional("p", p);
  a.q = rows.optional("q", q);
  a.x0 = parse_optional_input("x0", x0, elements);
  a.n = parse_optional_noise("n", n, a.layout);
  a.r = rows.optional("r", r);
  a.y = parse_optional_input("y", y, elements);
  if (!a.r.data != !a.y.data) throw py::value_error("y: goes with r, both or neither");
  if (!a.p.data != !a.x0.data) throw py::value_error("x0: goes with p, both or neither");
  if (!a.q.data != (a.n.kind == Noise::none)) throw py::value_error("n: goes with q, both or neither");
  a.scale = rows.optional("scale", scale);
  a.c = rows.optional("c", c);
  a.mask = parse_optional_mask(mask, a.layout);
  a.function = Function(parse_code("function", function, kFunctions));
  if (needs_c(a.function) && !a.c.data)
    throw py::value_error("c: this error function needs its constant");
  call.normalization = Normalization(parse_code("normalization", normalization, 3));
  call.reduction = Reduction(parse_code("reduction", reduction, 3));
  call.upstream = rows.optional("upstream", upstream);
  if (call.upstream.stride && a.layout.rows > 1 && call.reduction != Reduction::none)
    throw py::value_error("upstream: a reduced loss has one upstream gradient");
  const int64_t results = call.reduction == Reduction::none ? a.layout.rows : 1;
  call.result = parse_optional_output("result", result, results, rows.dtype());
  call.means = (double*)parse_optional_output("means", means, a.layout.rows, DType::f64).data;
  a.gradient = parse_optional_output("gradient", gradient, elements);
  const int team = parse_threads(threads);
  const Unlocked unlocked(a.layout);
  run(call, rows.wide, team);
}

py::handle moment(const char* name, py::handle tuple, int k) {
  if (!PyTuple_Check(tuple.ptr()) || PyTuple_GET_SIZE(tuple.ptr()) != kMoments)
    throw py::value_error(std::string(name) + ": expected a tuple of one for each moment");
  return PyTuple_GET_ITEM(tuple.ptr(), k);
}

void row_moments(py::handle layout, py::handle a, py::handle b, py::handle dtype, py::handle results,
                 py::handle threads) {
  MomentsCall call{};
  MomentsArguments& m = call.kernel;
  m.layout = parse_layout(layout);
  m.a = parse_input("a", a, m.layout.elements);
  m.b = parse_optional_input("b", b, m.layout.elements);
  const DType wanted = DType(parse_code("dtype", dtype, 2));
  for (int k = 0; k < kMoments; ++k)
    call.results[k] = parse_optional_output("results", moment("results", results, k), m.layout.rows, wanted);
  const int team = parse_threads(threads);
  const Unlocked unlocked(m.layout);
  run(call, wanted == DType::f64, team);
}

void row_moments_gradient(py::handle layout, py::handle a, py::handle b, py::handle upstream, py::handle d_a,
                          py::handle d_b, py::handle threads) {
  MomentsGradientArguments m{};
  m.layout = parse_layout(layout);
  RowParser rows{m.layout};
  m.a = parse_input("a", a, m.layout.elements);
  m.b = parse_optional_input("b", b, m.layout.elements);
  for (int k = 0; k < kMoments; ++k) m.upstream[k] = rows.optional("upstream", moment("upstream", upstream, k));
  m.d_a = parse_optional_output("d_a", d_a, m.layout.elements);
  m.d_b = parse_optional_output("d_b", d_b, m.layout.elements);
  const int team = parse_threads(threads);
  const Unlocked unlocked(m.layout);
  run(m, rows.wide, team);
}

void step(py::handle layout, py::handle x, py::handle m, py::handle uncond, py::handle guidance, py::handle table,
          py::handle clip, py::handle history, py::handle source, py::handle log_variance, py::handle y, py::handle x0,
          py::handle entry, py::handle threshold, py::handle mask, py::handle known, py::handle known_noise,
          py::handle model_input, py::handle threads) {
  StepArguments a{};
  a.layout = parse_layout(layout);
  const int64_t elements = a.layout.elements;
  RowParser rows{a.layout};
  a.table = rows.required("table", table, kColumns);
  a.x = parse_input("x", x, elements);
  a.m = parse_input("m", m, elements);
  a.uncond = parse_optional_input("uncond", uncond, elements);
  a.guidance = rows.optional("guidance", guidance);
  if (a.uncond.data && !a.guidance.data) throw py::value_error("guidance: is needed with uncond");
  a.clip = clip.is_none() ? -1 : parse_number("clip", clip);
  if (!clip.is_none() && !(a.clip >= 0)) throw py::value_error("clip: must be at least 0, or None");
  if (!PyTuple_Check(history.ptr()) || PyTuple_GET_SIZE(history.ptr()) > kHistory)
    throw py::value_error("history: expected a tuple of at most 4 tensors");
  for (int j = 0; j < PyTuple_GET_SIZE(history.ptr()); ++j)
    a.history[j] = parse_input("history", PyTuple_GET_ITEM(history.ptr(), j), elements);
  a.noise = parse_optional_noise("noise", source, a.layout);
  a.log_variance = parse_optional_input("log_variance", log_variance, elements);
  a.y = parse_output("y", y, elements);
  a.x0 = parse_optional_output("x0", x0, elements);
  a.entry = parse_optional_output("entry", entry, elements, rows.dtype());
  a.threshold = rows.optional("threshold", threshold);
  a.mask = parse_optional_mask(mask, a.layout);
  a.known = parse_optional_input("known", known, elements);
  a.known_noise = parse_optional_noise("known_noise", known_noise, a.layout);
  if (!a.mask.tensor.data != !a.known.data) throw py::value_error("known: goes with mask, both or neither");
  a.copies = 1;
  if (PyTuple_Check(model_input.ptr()) && PyTuple_GET_SIZE(model_input.ptr()) == 3 && elements &&
      parse_integer("model_input", PyTuple_GET_ITEM(model_input.ptr(), 2)) == 2 * elements)
    a.copies = 2;
  a.model_input = parse_optional_output("model_input", model_input, a.copies * elements);
  const int team = parse_threads(threads);
  const Unlocked unlocked(a.layout);
  run(a, rows.wide, team);
}

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
  module.def("noise", noise);
  module.def("convert", convert);
  module.def("loss", loss);
  module.def("row_moments", row_moments);
  module.def("row_moments_gradient", row_moments_gradient);
  module.def("step", step);
  bind_coefficients(module);
  bind_fast_calls(module);
  bind_trajectory(module);
  bind_step_table(module);
  bind_schedulers(module);
  module.def("simd", [] { return chosen().name; });
  module.def("simd_variants", simd_names);
  module.def("set_simd", set_simd);
  module.def("cuda_architectures", cuda_architectures);
#ifdef FASTDIFF_CUDA
  cuda::bind(module);
#endif
}
