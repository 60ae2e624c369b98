// A run of sampler steps. Everything that stays the same is prepared once; a step is then a call with four arguments.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_trajectory(pybind11::module_& module);

}  // namespace fastdiff
