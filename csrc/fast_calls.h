// Fast calls: noising, the mean loss and conversion of a batch with one time a sample, and a sampler step, on contiguous
// CPU tensors. A call reads its tensors, computes its coefficients and makes its results by itself, so it costs the host a
// microsecond or two. It returns None for tensors that it does not take; fastdiff/ops then does the call, or refuses it,
// with the same bits.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_fast_calls(pybind11::module_& module);

}  // namespace fastdiff
