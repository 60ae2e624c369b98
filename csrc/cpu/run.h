// The operations on all their elements: kernels on threads, and the loss put together from its sums.
#pragma once

#include "arguments.h"

namespace fastdiff {

// `threads`: at most so many; 0: as many as OpenMP would use. Few elements are done by the calling thread. How results
// are written (Output::streamed) is decided here.
void run(NormalArguments& arguments, int threads);
void run(TorchNormalArguments& arguments, int threads);
void run(NoiseArguments& arguments, bool wide, int threads);  // wide: compute in float64
void run(ConvertArguments& arguments, bool wide, int threads);
void run(StepArguments& arguments, bool wide, int threads);

struct LossCall {
  LossArguments kernel;  // its factor and sums are made here
  Reduction reduction;
  Normalization normalization;
  Rows upstream;          // of the result; absent: 1
  Output result;          // one number, or one a row, in the compute dtype
  double* means;          // one a row, before the weight: what the weight's gradient is made of
};

void run(LossCall& call, bool wide, int threads);

struct GaussianCall {
  GaussianArguments kernel;  // its factor and sums are made here
  Reduction reduction;
  Rows upstream;  // of the result; absent: 1
  Output result;  // one number, or one a row, in the compute dtype
};

void run(GaussianCall& call, bool wide, int threads);

void run(PosteriorArguments& arguments, bool wide, int threads);
void run(PosteriorGradientArguments& arguments, bool wide, int threads);

struct KLNormalCall {
  KLNormalArguments kernel;  // its factor and sums are made here
  Reduction reduction;
  Rows upstream;  // of the result; absent: 1
  Output result;  // one number, or one a row, in the compute dtype
};

void run(KLNormalCall& call, bool wide, int threads);

struct MomentsCall {
  MomentsArguments kernel;   // its sums are made here
  Output results[kMoments];  // one a row, in the compute dtype
};

void run(MomentsCall& call, bool wide, int threads);
void run(MomentsGradientArguments& arguments, bool wide, int threads);

}  // namespace fastdiff
