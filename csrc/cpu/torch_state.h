// The state of PyTorch's generator on the CPU, as torch.Generator.get_state gives it.
#pragma once

#include <cstdint>

namespace fastdiff {

// Draws `elements` (at least 16) of what torch.randn would draw in float32, on at most `threads` threads, and leaves the
// state as it would. False, and nothing done, for a state that is not as expected.
bool draw_torch_normals(void* state, int64_t bytes, float* out, int64_t elements, int threads);

}  // namespace fastdiff
