// Fast calls of step tables (fastdiff/ops/prepared.py): a step, or a noising, of a row whose coefficients are placed
// already. The noise that torch.randn would draw can be drawn in the same pass. As in direct.h, a call returns None for
// tensors that it does not take, and has drawn nothing then.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_prepared(pybind11::module_& module);

}  // namespace fastdiff
