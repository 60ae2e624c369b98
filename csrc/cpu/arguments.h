// The arguments of the kernels. They are plain data without member functions: translation units that are compiled for
// different instruction sets share these types, and an inline function could be linked from the wrong one.
#pragma once

#include <cstdint>

#include "../codes.h"

namespace fastdiff {


struct Input {
  const void* data;  // null: absent
  DType dtype;       // u8, where the operand is data: an image, which stands for u / 127.5 - 1
};

struct Output {
  void* data;  // null: not wanted
  DType dtype;
  bool streamed;  // written past the caches
};

// One number a row in the compute dtype; stride 0 where all rows share it.
struct Rows {
  const void* data;  // null: absent
  int stride;
};

// N elements in memory order are outer x shared x frames x inner; element (o, s, f, i) belongs to row o * frames + f.
// Leading rows ([B], [B, F]) have shared = frames = 1; rows [B, 1, F, 1, 1] of a video have shared = channels.
// `samples` and `channels` (dimension 1) say which noise belongs to an element, whatever its row.
//
// Or, with `starts`, rows are sequences one after another, each a sample of its own length: sequence r has elements
// starts[r] to starts[r + 1]. Then outer, shared, frames and inner are 1, and there are no samples of one size: 0.
struct Layout {
  int64_t outer, shared, frames, inner;
  int64_t samples, channels;
  int64_t rows, elements;
  const int64_t* starts = nullptr;  // [rows + 1], or null
};

constexpr int kTwisterWords = 624;

// What torch.randn would draw: at least 16 elements in float32, rounded to what they are stored in.
struct TorchNormalArguments {
  const uint64_t* state;  // kTwisterWords of them
  int position;           // how many of them were drawn, 1 to kTwisterWords
  int64_t elements;
  DType dtype;
  void* out;  // null where they are used at once
  uint32_t* state_after;
  int* position_after;
};

// Which samples noise is made for: numbered from `offset` on, or by the id of each.
struct Samples {
  uint64_t offset;
  const uint64_t* ids;  // null where they are numbered

  uint64_t operator[](int64_t sample) const { return ids ? ids[sample] : offset + uint64_t(sample); }
};

struct Noise {
  enum Kind { none, given, made, drawn } kind;
  Input tensor;  // where given
  uint64_t seed;
  Samples samples;
  uint32_t stream;
  float offset;  // of the channels
  // Where drawn, which is in order: from one run of memory, in blocks of whole chunks of 16.
  const TorchNormalArguments* draws;
  void* sequence;  // of the thread
};

constexpr int kMaxDims = 8;

// Where each element lies in memory, in elements. Neighbouring dimensions that can be one are one.
struct Strides {
  int dims;  // 0: contiguous
  int64_t sizes[kMaxDims], strides[kMaxDims];
};

// Any strides: 0 where the mask is broadcast.
struct Mask {
  Input tensor;
  Strides at;
};

// The order in which full-size data lies in memory, where it is another than that of the elements (tokens of an image's
// patches, channels_last). Counted in words of one or two elements that are neighbours in both orders.
struct Order {
  Strides at;
  int word;  // elements
};

// Where a slice of a sample lies in the whole one, whose elements the noise is counted by.
struct Window {
  int64_t first;  // the place of the slice's first element
  Strides at;     // the last stride is 1; no dims: the sample is whole
};

struct NormalArguments {
  Layout layout;
  Noise noise;
  Window window;
  Output out;
};

struct NoiseArguments {
  Layout layout;
  Input x0;
  Rows alpha, sigma;
  Noise n, xi;
  double perturbation;
  Output x_t, keep;
  Order order;  // of x_t
};

struct ConvertArguments {
  Layout layout;
  Input x_t, m;
  Rows k_x, k_m;
  Output out;
};

// A weighted sum of error functions.
struct Combination {
  double strengths[kFunctions], constants[kFunctions];
  bool of_row[kFunctions];  // the constant is the row's c
};

struct LossArguments {
  Layout layout;
  Input prediction, x0, y;
  Noise n;
  Rows p, q, r, scale, c;
  Rows weight;
  Rows factor;  // of the gradient: upstream * weight / divisor
  Mask mask;
  Function function;
  Combination parts;  // where the function is `combined`
  double* sums;    // one a unit of work, or null where no value is wanted
  bool every_sum;  // also those of rows of weight 0
  Output gradient;
  Output errors;   // weight mask rho(e; c) of each element, in the compute dtype
  Input d_errors;  // the upstream gradient of these: then `factor` is not read
  Order order;     // of prediction, gradient, errors and d_errors
};

struct GaussianArguments {
  Layout layout;
  Input output, x0;  // output: of the network, with l_v twice as many elements
  Noise n;
  Rows p, q, scale, l_0, l_v, l_q, half_width, weight, simple_weight;
  Rows factor;  // of the gradient: upstream / divisor
  bool freeze_mean;
  double* sums;  // one a unit of work, or null where no value is wanted
  Output gradient;  // by the output
};

// `moments` has twice as many elements as the layout: of each sample the means, and behind them the log-variances, which
// are clamped to [least, most].
struct PosteriorArguments {
  Layout layout;
  Input moments;
  Noise xi, n;  // xi: none for the mean itself
  Rows shift, scale, alpha, sigma;
  double least, most;
  Output z, x_t, keep;
};

struct PosteriorGradientArguments {
  Layout layout;
  Input moments, d_z, d_x_t;
  Noise xi;
  Rows scale, alpha;
  double least, most;
  Output gradient;  // by the moments
};

struct KLNormalArguments {
  Layout layout;
  Input moments;
  Rows weight;
  Rows factor;  // of the gradient: upstream * weight / divisor
  double least, most;
  double* sums;     // one a unit of work, or null where no value is wanted
  Output gradient;  // by the moments
};

struct MaskSumArguments {
  Layout layout;
  Mask mask;
  double* sums;
};

struct MomentsArguments {
  Layout layout;
  Input a, b;
  double* sums;  // of each moment, one a unit of work
  int64_t units;
};

struct MomentsGradientArguments {
  Layout layout;
  Input a, b;
  Rows upstream[kMoments];
  Output d_a, d_b;
};

struct StepArguments {
  Layout layout;
  Input x, m, uncond, log_variance;
  Input history[kHistory];
  Rows table;  // kColumns numbers a row; stride 0 or kColumns
  Rows guidance;
  double clip;     // negative: none
  Rows threshold;  // x0 is clamped to it and divided by it
  Noise noise;
  Mask mask;  // of what is known
  Input known;
  Noise known_noise;
  Output y, x0, entry;
  Output model_input;  // c_in y, `copies` times, one behind the other
  int copies;
};

}  // namespace fastdiff
