// The work of a fused scheduler's step besides the arithmetic: check that its tables are still right, and make the object
// that it returns. It takes a microsecond in Python, a third of that here.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_schedulers(pybind11::module_& module);

}  // namespace fastdiff
