// Fast calls on plain tensors: what a training step of a batch with one time a sample, and a sampler step, come down to
// most of the time. A call reads its tensors itself, gathers its rows and makes its results; so it costs the host a
// microsecond or two. Anything else than the plain case gives None, and is done, or refused, by fastdiff/ops.
#pragma once

#include <pybind11/pybind11.h>

namespace fastdiff {

void bind_fast_calls(pybind11::module_& module);

}  // namespace fastdiff
