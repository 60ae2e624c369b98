// The arguments of the step kernel, and the choices that the host makes before it is launched. See fastdiff/ops/step.py
// for the formula, step_group.h for the arithmetic, step.cu for the kernel.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../codes.h"

namespace fastdiff {
namespace cuda {

// Codes of fastdiff._C; kAny where a kernel looks at it when it runs.
enum Code : int {
  kAny = -1, kF32 = int(DType::f32), kBF16 = int(DType::bf16), kF16 = int(DType::f16), kU8 = int(DType::u8)
};

struct Tensor {
  void* data;  // null: absent
  int code;
};

// One number, or one a sample.
struct Numbers {
  const float* data;  // null: `value`
  float value;
  int stride;  // 0 or 1
};

struct Noise {
  enum Kind : int { none, given, made } kind;
  Tensor tensor;              // where given
  const int64_t* seed;        // on the device; null: `seed_value`
  const int64_t* streams;     // on the device, one a row of the table; null: `stream`
  uint64_t seed_value, sample_offset;
  uint32_t stream;
};

struct StepArguments {
  int64_t samples, sample, elements;  // elements = samples * sample
  uint32_t groups, groups_of_sample;  // a group is what one thread does, see plan()

  const float* table;  // [rows, kColumns]
  int64_t rows;
  int row_stride;   // without an index: 1 where every sample has a row, else 0
  int64_t* index;   // on the device: the row to use; null: none
  int index_stride; // 1 where every sample has an index, else 0
  uint32_t* ticket; // on the device, 0 between launches: the last block to end adds one to the index; null: none does

  Tensor x, m, uncond;
  Numbers guidance, threshold;  // threshold.stride < 0: none
  float clip;                   // negative: none
  Tensor history[kHistory];
  int histories;
  bool shift;  // history[j] becomes history[j - 1] and history[0] the entry, where the row makes one
  Noise noise;
  Tensor log_variance;
  Tensor mask, known;
  int64_t mask_inner, mask_stride;  // element e of sample b: mask[b * mask_stride + e % mask_inner]
  Noise known_noise;
  Tensor y, x0, entry, model_input;
  int copies;  // of the model input
};

constexpr int kVectorWidth = 8, kScalarWidth = 4;  // elements a thread
constexpr uint32_t kMostGroups = 0xFFFFFF00u;      // so that a rounded-up number of threads has 32 bits

inline bool aligned(const Tensor& tensor) { return (uintptr_t)tensor.data % (tensor.code == kU8 ? 8 : 16) == 0; }

// Whether anything depends on which sample an element belongs to.
inline bool knows_samples(const StepArguments& a) {
  const bool rows = a.index ? a.index_stride != 0 : a.row_stride != 0;
  const bool made = a.noise.kind == Noise::made || a.known_noise.kind == Noise::made;
  const bool masked = a.mask.data && !(a.mask_inner == a.sample && a.mask_stride == a.sample);
  return rows || made || masked || (a.uncond.data && a.guidance.data && a.guidance.stride) || a.threshold.stride > 0;
}

// Fills in the groups, and returns whether the 16-byte accesses of the vector kernels can be used: rows and pointers
// are aligned. `groups` is 0 if there are too many.
inline bool plan(StepArguments& a) {
  if (!knows_samples(a)) {
    a.sample = a.elements;
    a.samples = 1;
    a.mask_inner = a.elements;
  }
  bool vector = a.sample % kVectorWidth == 0 && (!a.mask.data || a.mask_inner % kVectorWidth == 0);
  const Tensor* tensors[] = {&a.x,    &a.m,    &a.uncond,            &a.noise.tensor, &a.log_variance,
                             &a.mask, &a.known, &a.known_noise.tensor, &a.y,          &a.x0,
                             &a.entry, &a.model_input};
  for (const Tensor* tensor : tensors) vector = vector && aligned(*tensor);
  for (int j = 0; j < a.histories; ++j) vector = vector && aligned(a.history[j]);
  const int64_t width = vector ? kVectorWidth : kScalarWidth;
  const int64_t of_sample = (a.sample + width - 1) / width;
  int64_t groups;
  const bool fits = !__builtin_mul_overflow(of_sample, a.samples, &groups) && groups <= int64_t(kMostGroups);
  a.groups = fits ? uint32_t(groups) : 0;
  a.groups_of_sample = fits ? uint32_t(of_sample) : 0;
  return vector;
}

// Whether the kernel that is made for one dtype can be used: data of one dtype, float32 history, nothing unusual.
inline bool simple(const StepArguments& a) {
  const int code = a.x.code;
  const auto is = [](const Tensor& tensor, int wanted) { return !tensor.data || tensor.code == wanted; };
  bool all = is(a.m, code) && is(a.uncond, code) && is(a.y, code) && is(a.x0, code) && is(a.model_input, code);
  for (int j = 0; j < a.histories; ++j) all = all && is(a.history[j], kF32);
  return all && !a.shift && !a.log_variance.data && !a.mask.data && a.threshold.stride < 0;
}

// Launches what is planned, on `stream` of `device`; 0, or the error code of the CUDA runtime. Waits for nothing.
int launch(const StepArguments& planned, bool vector, int device, void* stream);
// Loads the kernels on `device`, so that a later launch, in a graph that is being captured too, has nothing to load.
int load(int device);
const char* error_text(int code);

}  // namespace cuda
}  // namespace fastdiff
