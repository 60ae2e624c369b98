// The CUDA step as a Python module whose "device" is the CPU: the binding and the arithmetic of csrc/cuda, with a loop
// in the place of the launch. Compiled by test_cuda_step.py.
#include "../../csrc/checks.cpp"
#include "../../csrc/cuda/binding.cpp"
#include "../../csrc/cuda/step_group.h"
#include "../../csrc/tensors.cpp"

namespace fastdiff {
namespace cuda {

static const char* last = "";

int launch(const StepArguments& a, bool vector, int, void*) {
  const bool narrow = vector && simple(a);
  last = !vector ? "scalar" : narrow ? "simple" : "vector";
  for (uint32_t group = 0; group < a.groups; ++group) {
    if (!vector)
      step_group<kAny, true, false>(a, group);
    else if (!narrow)
      step_group<kAny, true, true>(a, group);
    else if (a.x.code == kF32)
      step_group<kF32, false, true>(a, group);
    else if (a.x.code == kBF16)
      step_group<kBF16, false, true>(a, group);
    else
      step_group<kF16, false, true>(a, group);
  }
  if (a.ticket) *a.index += 1;
  return 0;
}
int load(int) { return 0; }
const char* error_text(int) { return ""; }

}  // namespace cuda
}  // namespace fastdiff

PYBIND11_MODULE(step_on_host, module) {
  fastdiff::cuda::bind(module);
  module.def("last", [] { return fastdiff::cuda::last; });
}
