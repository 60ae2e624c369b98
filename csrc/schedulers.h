// What a fused scheduler does in every step besides the arithmetic: see whether its tables still hold, and make the
// object that it returns. A microsecond in Python, a third of it here.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_schedulers(pybind11::module_& module);

}  // namespace fastdiff
