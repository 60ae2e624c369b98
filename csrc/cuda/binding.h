// The CUDA step in Python's arguments; part of fastdiff._C where it is built with nvcc.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {
namespace cuda {

// Adds cuda_step and cuda_load to the module.
void bind(pybind11::module_& module);

}  // namespace cuda
}  // namespace fastdiff
