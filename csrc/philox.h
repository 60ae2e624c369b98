// The noise: Philox4x32-10 and a normal transform whose every step is one IEEE float32 operation.
//
// This is the scalar form, for a CPU and a GPU alike; cpu/normals.h is the same thing on vectors. It equals
// fastdiff/backends/reference/philox.py to the bit, and once released it never changes: it is the noise.
#pragma once

#include <cstdint>
#include <cstring>

// nvcc makes these functions for the device, any other compiler for the host: none is needed on both sides of one file.
#ifdef __CUDACC__
#define FASTDIFF_DEVICE __device__ __forceinline__
#define FASTDIFF_COEFFICIENTS __device__ constexpr float
#else
#define FASTDIFF_DEVICE inline __attribute__((always_inline))
#define FASTDIFF_COEFFICIENTS constexpr float
#endif

namespace fastdiff {
namespace philox {

constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
constexpr int kRounds = 10;

// Streams of one seed that an operation names itself; see fastdiff/ops/noise.py.
constexpr uint32_t kOffsetStream = 1;

// -2 ln(1 + t) / t for t in [-0.293, 0.414), the highest coefficient first.
FASTDIFF_COEFFICIENTS kLog[] = {0.20757412910461426f, -0.326762855052948f,  0.34424856305122375f, -0.397684723138809f,
                                0.49943119287490845f, -0.6667121648788452f, 1.000006914138794f,   -1.9999998807907104f};
constexpr float kLogOfExponent = -1.6525916635146132e-07f;  // -2 ln 2 / 2^23
constexpr float kLogOfScale = 44.361419677734375f;          // 2 * 32 ln 2
// sin and cos of a quarter turn, over sqrt(2), in z = a^2 for a in [-1/2, 1/2).
FASTDIFF_COEFFICIENTS kSin[] = {0.05512253f, -0.45665085882f, 1.1107191455f};
FASTDIFF_COEFFICIENTS kCos[] = {-0.01442851647f, 0.1793213209912f, -0.872355524f, 0.70710676169f};
constexpr uint32_t kSqrtHalf = 0x3F3504F3u;  // the bits of sqrt(1/2), around which the exponent is split off
constexpr float kSmallest = 1e-30f;          // what the square of the radius is kept above

struct Words {
  uint32_t o[4];
};

FASTDIFF_DEVICE Words words(uint64_t seed, uint32_t group, uint32_t stream, uint64_t sample) {
  uint32_t c0 = group, c1 = stream, c2 = uint32_t(sample), c3 = uint32_t(sample >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t product0 = uint64_t(c0) * kMultiplier0, product1 = uint64_t(c2) * kMultiplier1;
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// The stream of a group: counters have 32 bits for the group, so what is above them goes into the stream's top 8.
FASTDIFF_DEVICE uint32_t stream_of(uint32_t stream, uint64_t group) { return stream ^ uint32_t(group >> 32) << 24; }

// A uniform in the open interval (0, 1), of the first two words or, `odd`, of the last two: 52 random bits and a half.
FASTDIFF_DEVICE double uniform(const Words& w, bool odd) {
  return (double((uint64_t(w.o[2 * odd]) << 20) | (w.o[2 * odd + 1] >> 12)) + 0.5) * 0x1p-52;
}

FASTDIFF_DEVICE float fused(float a, float b, float c) {
#ifdef __CUDA_ARCH__
  return __fmaf_rn(a, b, c);
#else
  return __builtin_fmaf(a, b, c);
#endif
}

// On a GPU contraction is to be switched off (-fmad=false), as -ffp-contract=off does on a CPU.
FASTDIFF_DEVICE float root(float x) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

FASTDIFF_DEVICE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FASTDIFF_DEVICE uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

struct Pair {
  float first, second;
};

// Two normals from two words: the radius from i1, the angle and the signs from i2.
FASTDIFF_DEVICE Pair box_muller(uint32_t i1, uint32_t i2) {
  const uint32_t bits = to_bits(float(i1 | 1));  // 2^32 times a uniform in (0, 1]
  const uint32_t exponent = (bits - kSqrtHalf) & 0xFF800000u;
  const float t = from_bits(bits - exponent) - 1.0f;
  float p = kLog[0];
  for (int k = 1; k < 8; ++k) p = fused(p, t, kLog[k]);
  const float y = fused(p, t, fused(float(int32_t(exponent)), kLogOfExponent, kLogOfScale));  // -2 ln u
  const float radius = root(y > kSmallest ? y : kSmallest);

  const float a = from_bits((i2 >> 9) + 0x3F800000u) - 1.5f;
  const float z = a * a;
  float sine = kSin[0], cosine = kCos[0];
  for (int k = 1; k < 3; ++k) sine = fused(sine, z, kSin[k]);
  for (int k = 1; k < 4; ++k) cosine = fused(cosine, z, kCos[k]);
  sine = a * sine;
  const float n1 = radius * (cosine - sine), n2 = radius * (cosine + sine);
  return {from_bits(to_bits(n1) ^ (i2 << 31)), from_bits(to_bits(n2) ^ ((i2 >> 1) << 31))};
}

// Element `element` of a sample: lane element mod 4 of group element div 4.
FASTDIFF_DEVICE float normal(uint64_t seed, uint32_t stream, uint64_t sample, uint64_t element) {
  const Words w = words(seed, uint32_t(element / 4), stream_of(stream, element / 4), sample);
  const int lane = int(element % 4);
  const Pair pair = box_muller(w.o[lane & 2], w.o[(lane & 2) + 1]);
  return lane & 1 ? pair.second : pair.first;
}

}  // namespace philox
}  // namespace fastdiff
