// The kernels of one instruction set, and the choice among them.
#pragma once

#include "arguments.h"

namespace fastdiff {

// Each works on units [begin, end) of its layout (work.h). The index is the compute dtype: 0 float32, 1 float64.
struct Table {
  void (*normal)(const NormalArguments&, int64_t begin, int64_t end);
  void (*torch_normal)(const TorchNormalArguments&, int64_t begin, int64_t end);  // of chunks of 16
  void (*noise[2])(const NoiseArguments&, int64_t begin, int64_t end);
  void (*convert[2])(const ConvertArguments&, int64_t begin, int64_t end);
  void (*loss[2])(const LossArguments&, int64_t begin, int64_t end);
  void (*elements[2])(const LossArguments&, int64_t begin, int64_t end);
  void (*gaussian[2])(const GaussianArguments&, int64_t begin, int64_t end);
  void (*posterior[2])(const PosteriorArguments&, int64_t begin, int64_t end);
  void (*posterior_gradient[2])(const PosteriorGradientArguments&, int64_t begin, int64_t end);
  void (*kl_normal[2])(const KLNormalArguments&, int64_t begin, int64_t end);
  void (*mask_sum[2])(const MaskSumArguments&, int64_t begin, int64_t end);
  void (*moments[2])(const MomentsArguments&, int64_t begin, int64_t end);
  void (*moments_gradient[2])(const MomentsGradientArguments&, int64_t begin, int64_t end);
  void (*step[2])(const StepArguments&, int64_t begin, int64_t end);
};

struct Variant {
  const char* name;
  const Table* table;
  bool (*supported)();
};

// Every variant that was compiled, the best first; count is set.
const Variant* variants(int& count);
// The one in use: the best that this machine supports, unless another was chosen.
const Variant& chosen();
// False if there is no such variant, or this machine lacks what it needs.
bool choose(const char* name);

}  // namespace fastdiff
