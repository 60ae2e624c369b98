// Fast calls of step tables (fastdiff/ops/step_table.py): a step, or a noising, of a row whose coefficients are placed
// already. The noise that torch.randn would draw can be drawn in the same pass. As in fast_calls.h, a call returns None
// for tensors that it does not take, and has drawn nothing then.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_step_table(pybind11::module_& module);

}  // namespace fastdiff
