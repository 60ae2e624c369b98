// Sequences of kernel launches on a GPU that are repeated with other tensors and numbers.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_gpu_launch(pybind11::module_& module);

}  // namespace fastdiff
