// The state of PyTorch's generator on the CPU, as torch.Generator.get_state gives it.
#pragma once

#include "arguments.h"

namespace fastdiff {

// A draw of normals: opened on the bytes of a state, run, and closed, which leaves the state that follows there.
class TorchDraw {
 public:
  // False for a state that is not as expected, and for what torch.randn draws in another way: fewer than 16 elements,
  // or a rest of a chunk of 16 in another dtype than float32.
  bool open(void* state, int64_t bytes, int64_t elements, DType dtype);
  TorchNormalArguments& arguments() { return arguments_; }
  void close();

 private:
  void* state_ = nullptr;
  uint32_t after_[kTwisterWords];
  int position_after_ = 0;
  TorchNormalArguments arguments_{};
};

}  // namespace fastdiff
