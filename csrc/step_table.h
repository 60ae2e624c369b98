// The calls behind fastdiff.ops.step_table, on whole tensors: a row that is placed already, so that a step or a noising is
// one call. What torch.randn would draw can be drawn in the same pass. As in fast_calls.h, anything else than the plain case
// gives None, before anything is drawn.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_step_table(pybind11::module_& module);

}  // namespace fastdiff
