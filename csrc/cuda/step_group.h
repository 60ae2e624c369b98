// One thread's part of a step: the elements of one group, all arithmetic in float32 in the reference's order, one
// rounding at the store. nvcc compiles it for the device, and any other compiler for the host, where the tests hold it
// against the reference. Contraction must be off: -fmad=false, -ffp-contract=off.
#pragma once

#include <cmath>

#include "../philox.h"
#include "step.h"

namespace fastdiff {
namespace cuda {

#ifdef __CUDACC__
#define FASTDIFF_UNROLL _Pragma("unroll")
#define FASTDIFF_ROLLED _Pragma("unroll 1")
#else
#define FASTDIFF_UNROLL
#define FASTDIFF_ROLLED
#endif

// --- storage

FASTDIFF_DEVICE int size_of(int code) { return code == kF32 ? 4 : code == kU8 ? 1 : 2; }

// Two 16-bit numbers in a word, the first in the lower half, to float32 and back, to nearest even.
FASTDIFF_DEVICE void widen(int code, uint32_t word, float& first, float& second) {
  if (code == kBF16) {
    first = philox::from_bits(word << 16);
    second = philox::from_bits(word & 0xFFFF0000u);
    return;
  }
#ifdef __CUDACC__
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(first), "=f"(second)
      : "r"(word));
#else
  const auto one = [](uint32_t half) {
    const float size = philox::from_bits((half & 0x7FFF) << 13) * 0x1p112f;
    const uint32_t special = (half & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;
    return philox::from_bits(philox::to_bits(size) | special | (half & 0x8000) << 16);
  };
  first = one(word & 0xFFFF);
  second = one(word >> 16);
#endif
}

FASTDIFF_DEVICE uint32_t narrow(int code, float first, float second) {
#ifdef __CUDACC__
  uint32_t word;
  if (code == kBF16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  const auto bf16 = [](float value) {
    const uint32_t bits = philox::to_bits(value);
    return value != value ? 0x7FFFu : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
  };
  const auto f16 = [](float value) {
    const uint32_t sign = philox::to_bits(value) >> 16 & 0x8000;
    uint32_t bits = philox::to_bits(value) & 0x7FFFFFFF;
    if (bits > 0x7F800000) return 0x7FFFu;
    if (bits >= 0x477FF000) return sign | 0x7C00;
    if (bits < 0x38800000) return sign | (philox::to_bits(philox::from_bits(bits) + 0.5f) - 0x3F000000);
    return sign | (bits + 0xFFF + (bits >> 13 & 1) - 0x38000000) >> 13;
  };
  return code == kBF16 ? bf16(first) | bf16(second) << 16 : f16(first) | f16(second) << 16;
#endif
}

struct alignas(16) Sixteen {
  uint32_t words[4];
};

FASTDIFF_DEVICE Sixteen load16(const char* from) {
#ifdef __CUDACC__
  const uint4 v = *(const uint4*)from;
  return {{v.x, v.y, v.z, v.w}};
#else
  Sixteen v;
  memcpy(&v, from, 16);
  return v;
#endif
}

FASTDIFF_DEVICE void store16(char* to, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
#ifdef __CUDACC__
  *(uint4*)to = make_uint4(a, b, c, d);
#else
  const Sixteen v{{a, b, c, d}};
  memcpy(to, &v, 16);
#endif
}

template <class T>
FASTDIFF_DEVICE T load_one(const char* from) {
#ifdef __CUDACC__
  return *(const T*)from;
#else
  T v;
  memcpy(&v, from, sizeof(T));
  return v;
#endif
}

template <class T>
FASTDIFF_DEVICE void store_one(char* to, T value) {
#ifdef __CUDACC__
  *(T*)to = value;
#else
  memcpy(to, &value, sizeof(T));
#endif
}

// The bytes of a group on their way: fetched first, for all tensors, and opened when they are needed.
template <int width>
struct Fetched {
  uint32_t words[width];
};

// Elements [at, at + count) of a tensor. The code is kCode, or that of the tensor where kCode is kAny.
template <int kCode, bool kVector, int width>
FASTDIFF_DEVICE Fetched<width> fetch(const Tensor& tensor, int64_t at, int count) {
  const int code = kCode == kAny ? tensor.code : kCode;
  const char* from = (const char*)tensor.data + at * size_of(code);
  Fetched<width> f;
  if constexpr (kVector) {
    const Sixteen low = load16(from);
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) f.words[k] = low.words[k];
    if (code == kF32) {
      const Sixteen high = load16(from + 16);
      FASTDIFF_UNROLL
      for (int k = 0; k < 4; ++k) f.words[4 + k] = high.words[k];
    }
  } else {
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) f.words[k] = 0;
    if (code == kF32) {
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k)
        if (k < count) f.words[k] = load_one<uint32_t>(from + 4 * k);
    } else {
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k)
        if (k < count) f.words[k / 2] |= uint32_t(load_one<uint16_t>(from + 2 * k)) << 16 * (k % 2);
    }
  }
  return f;
}

template <int kCode, int width>
FASTDIFF_DEVICE void open(const Tensor& tensor, const Fetched<width>& f, float (&values)[width]) {
  const int code = kCode == kAny ? tensor.code : kCode;
  if (code == kF32) {
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) values[k] = philox::from_bits(f.words[k]);
  } else {
    FASTDIFF_UNROLL
    for (int k = 0; k < width; k += 2) widen(code, f.words[k / 2], values[k], values[k + 1]);
  }
}

template <int kCode, bool kVector, int width>
FASTDIFF_DEVICE void load(const Tensor& tensor, int64_t at, int count, float (&values)[width]) {
  open<kCode>(tensor, fetch<kCode, kVector, width>(tensor, at, count), values);
}

template <int kCode, bool kVector, int width>
FASTDIFF_DEVICE void store(const Tensor& tensor, int64_t at, int count, const float (&values)[width]) {
  const int code = kCode == kAny ? tensor.code : kCode;
  char* to = (char*)tensor.data + at * size_of(code);
  if (code == kF32) {
    if constexpr (kVector) {
      FASTDIFF_UNROLL
      for (int k = 0; k < width; k += 4)
        store16(to + 4 * k, philox::to_bits(values[k]), philox::to_bits(values[k + 1]), philox::to_bits(values[k + 2]),
                philox::to_bits(values[k + 3]));
    } else {
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k)
        if (k < count) store_one(to + 4 * k, values[k]);
    }
  } else {
    uint32_t words[width / 2];
    FASTDIFF_UNROLL
    for (int k = 0; k < width; k += 2) words[k / 2] = narrow(code, values[k], values[k + 1]);
    if constexpr (kVector) {
      store16(to, words[0], words[1], words[2], words[3]);
    } else {
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k)
        if (k < count) store_one(to + 2 * k, uint16_t(words[k / 2] >> 16 * (k % 2)));
    }
  }
}

// A mask may be of bytes too: 0 is 0, everything else 1.
template <bool kVector, int width>
FASTDIFF_DEVICE void load_mask(const Tensor& mask, int64_t inner, int64_t start, int64_t element, int count,
                               float (&values)[width]) {
  if constexpr (kVector) {
    const int64_t at = start + element % inner;
    if (mask.code != kU8) return load<kAny, true>(mask, at, count, values);
    const uint64_t bytes = load_one<uint64_t>((const char*)mask.data + at);
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) values[k] = bytes >> 8 * k & 0xFF ? 1.0f : 0.0f;
  } else {
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) {
      values[k] = 0;
      if (k >= count) continue;
      const char* from = (const char*)mask.data + (start + (element + k) % inner) * size_of(mask.code);
      if (mask.code == kU8) {
        values[k] = load_one<uint8_t>(from) ? 1.0f : 0.0f;
      } else if (mask.code == kF32) {
        values[k] = load_one<float>(from);
      } else {
        float none;
        widen(mask.code, load_one<uint16_t>(from), values[k], none);
      }
    }
  }
}

// --- coefficients

struct Row {
  const float* at;
  bool inside;
  // An index beyond the table makes the sample NaN instead of reading what is not there.
  FASTDIFF_DEVICE float operator[](int column) const {
    return inside ? at[column] : philox::from_bits(0x7FFFFFFF);
  }
};

FASTDIFF_DEVICE int64_t row_index(const StepArguments& a, int64_t sample) {
  if (a.index) return a.index[sample * a.index_stride];
  return sample * a.row_stride;
}

FASTDIFF_DEVICE float number(const Numbers& numbers, int64_t sample) {
  return numbers.data ? numbers.data[sample * numbers.stride] : numbers.value;
}

// --- noise

template <bool kVector, int width>
FASTDIFF_DEVICE void load_noise(const Noise& noise, int64_t row, int64_t sample, int64_t element, int64_t at, int count,
                                float (&values)[width]) {
  if (noise.kind == Noise::given) return load<kAny, kVector>(noise.tensor, at, count, values);
  const uint64_t seed = noise.seed ? uint64_t(*noise.seed) : noise.seed_value;
  const uint32_t stream = noise.streams ? uint32_t(noise.streams[row]) : noise.stream;
  FASTDIFF_UNROLL
  for (int k = 0; k < width; k += 4) {
    const philox::Words w =
        philox::words(seed, uint32_t(element / 4) + uint32_t(k / 4), stream, noise.sample_offset + uint64_t(sample));
    const philox::Pair first = philox::box_muller(w.o[0], w.o[1]), second = philox::box_muller(w.o[2], w.o[3]);
    values[k] = first.first;
    values[k + 1] = first.second;
    values[k + 2] = second.first;
    values[k + 3] = second.second;
  }
}

// --- the step

FASTDIFF_DEVICE float clamped(float value, float bound) {  // NaN stays
  return value < -bound ? -bound : (value > bound ? bound : value);
}

// kCode: the dtype of all data; kAny looks at each tensor's own. kFull: everything; else only what simple() lets in.
template <int kCode, bool kFull, bool kVector>
FASTDIFF_DEVICE void step_group(const StepArguments& a, uint32_t group) {
  constexpr int width = kVector ? kVectorWidth : kScalarWidth;
  const int64_t sample = a.samples > 1 ? group / a.groups_of_sample : 0;
  const int64_t element = int64_t(group - uint32_t(sample) * a.groups_of_sample) * width;
  const int64_t at = sample * a.sample + element;
  const int count = kVector || a.sample - element > width ? width : int(a.sample - element);

  const Fetched<width> raw_x = fetch<kCode, kVector, width>(a.x, at, count);
  const Fetched<width> raw_m = fetch<kCode, kVector, width>(a.m, at, count);
  Fetched<width> raw_uncond;
  if (a.uncond.data) raw_uncond = fetch<kCode, kVector, width>(a.uncond, at, count);
  const int64_t index = row_index(a, sample);
  const bool inside = index >= 0 && index < a.rows;
  const Row row{a.table + (inside ? index : 0) * kColumns, inside};

  float x[width], m[width], x0[width], y[width], entry[width], other[width];
  open<kCode>(a.x, raw_x, x);
  open<kCode>(a.m, raw_m, m);
  if (a.uncond.data) {
    open<kCode>(a.uncond, raw_uncond, other);
    const float scale = number(a.guidance, sample);
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) m[k] = other[k] + scale * (m[k] - other[k]);
  }
  {
    const float of_x = row[p_x], of_m = row[p_m];
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) x0[k] = of_x * x[k] + of_m * m[k];
  }
  if (a.clip >= 0) {
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) x0[k] = clamped(x0[k], a.clip);
  }
  if (kFull && a.threshold.stride >= 0) {
    const float bound = number(a.threshold, sample);
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) x0[k] = clamped(x0[k], bound) / bound;
  }
  if (a.x0.data) store<kCode, kVector>(a.x0, at, count, x0);
  {
    const float of_x = row[c_x], of_m = row[c_m], of_x0 = row[c_x0];
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) y[k] = of_x * x[k] + of_m * m[k] + of_x0 * x0[k];
  }
  bool keeps = a.entry.data != nullptr, shifts = false;
  if (keeps || (kFull && a.shift)) {
    const float of_x = row[h_x], of_m = row[h_m], of_x0 = row[h_x0];
    shifts = kFull && a.shift && (of_x != 0 || of_m != 0 || of_x0 != 0);
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) entry[k] = of_x * x[k] + of_m * m[k] + of_x0 * x0[k];
  }
  FASTDIFF_ROLLED
  for (int j = 0; j < a.histories; ++j) {
    constexpr int kPast = kFull ? int(kAny) : int(kF32);
    load<kPast, kVector>(a.history[j], at, count, other);
    const float factor = row[c_h1 + j];
    // One that is not in use yet may hold anything: under a graph all of them are there from the first step on.
    if (!kFull || !a.shift || factor != 0) {
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k) y[k] = y[k] + factor * other[k];
    }
    if (shifts) {
      store<kF32, kVector>(a.history[j], at, count, entry);
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k) entry[k] = other[k];
    }
  }
  if (keeps) store<kF32, kVector>(a.entry, at, count, entry);

  if (a.noise.kind != Noise::none) {
    const float strength = row[c_noise];
    if (kFull && a.log_variance.data) {
      float variance[width];
      load<kAny, kVector>(a.log_variance, at, count, variance);
      load_noise<kVector>(a.noise, inside ? index : 0, sample, element, at, count, other);
      const float first = row[l_0], factor = row[l_v];
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k)
        y[k] = y[k] + strength * expf(0.5f * (first + factor * variance[k])) * other[k];
    } else if (a.noise.kind == Noise::given || strength != 0) {
      load_noise<kVector>(a.noise, inside ? index : 0, sample, element, at, count, other);
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k) y[k] = y[k] + strength * other[k];
    }
  }
  if (kFull && a.mask.data) {
    float kept[width];
    const float of_known = row[k_x0], of_noise = row[k_n];
    load<kAny, kVector>(a.known, at, count, kept);
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) kept[k] = of_known * kept[k];
    if (a.known_noise.kind != Noise::none) {
      load_noise<kVector>(a.known_noise, 0, sample, element, at, count, other);
      FASTDIFF_UNROLL
      for (int k = 0; k < width; ++k) kept[k] = kept[k] + of_noise * other[k];
    }
    load_mask<kVector>(a.mask, a.mask_inner, sample * a.mask_stride, element, count, other);
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) y[k] = other[k] * kept[k] + (1.0f - other[k]) * y[k];
  }
  store<kCode, kVector>(a.y, at, count, y);
  if (a.model_input.data) {
    const float scale = row[c_in];
    FASTDIFF_UNROLL
    for (int k = 0; k < width; ++k) y[k] = scale * y[k];
    store<kCode, kVector>(a.model_input, at, count, y);
    if (a.copies > 1) store<kCode, kVector>(a.model_input, at + a.elements, count, y);
  }
}

}  // namespace cuda
}  // namespace fastdiff
