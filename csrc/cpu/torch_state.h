// The state of PyTorch's generator on the CPU, as torch.Generator.get_state gives it.
#pragma once

#include "arguments.h"

namespace fastdiff {

// A draw of float32 normals: opened on the bytes of a state, run, and closed, which leaves the state that follows there.
class TorchDraw {
 public:
  // False for a state that is not as expected, or fewer elements than torch.randn draws in this way.
  bool open(void* state, int64_t bytes, int64_t elements);
  TorchNormalArguments& arguments() { return arguments_; }
  void close();

 private:
  void* state_ = nullptr;
  uint32_t after_[kTwisterWords];
  int position_after_ = 0;
  TorchNormalArguments arguments_{};
};

}  // namespace fastdiff
