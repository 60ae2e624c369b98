// philox.h on vectors: the same operations in the same order, so the same bits.
#pragma once

#include "../philox.h"
#include "simd.h"
#include "work.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

constexpr int kGroups = kBytes / 8;        // groups made at a time, one in each 64-bit lane
constexpr int kNormals = 4 * kGroups;      // and the normals that they make
constexpr int kSlack = 32;                 // a buffer for normals is so much longer than what is asked for
static_assert(kNormals <= kSlack, "a vector of groups must fit into the slack");

// How many vectors are worked on side by side: one chain of operations leaves a processor waiting, several do not.
constexpr int kChains = 4;

// The words stay in 64-bit lanes. A product looks only at the low half of a lane, so the high halves of the words,
// which hold what is left of earlier products, need no clearing.
template <int chains>
FASTDIFF_INLINE void philox_rounds(Longs (&c)[chains][4], uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < philox::kRounds; ++round) {
    const Longs key0 = Longs{} + k0, key1 = Longs{} + k1;
#pragma GCC unroll 4
    for (int j = 0; j < chains; ++j) {
      const Longs product0 = product(c[j][0], Longs{} + philox::kMultiplier0);
      const Longs product1 = product(c[j][2], Longs{} + philox::kMultiplier1);
      c[j][0] = (product1 >> 32) ^ c[j][1] ^ key0;
      c[j][1] = product1;
      c[j][2] = (product0 >> 32) ^ c[j][3] ^ key1;
      c[j][3] = product0;
    }
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
}

template <int n>
FASTDIFF_INLINE Floats polynomial(Floats x, const float (&coefficients)[n]) {
  Floats value = fill(coefficients[0]);
#pragma GCC unroll 8
  for (int k = 1; k < n; ++k) value = fused(value, x, fill(coefficients[k]));
  return value;
}

#define FASTDIFF_EACH _Pragma("GCC unroll 4") for (int j = 0; j < n; ++j)

// philox::box_muller on n pairs of vectors, step by step side by side.
template <int n>
FASTDIFF_INLINE void box_muller(const Words (&i1)[n], const Words (&i2)[n], Floats (&n1)[n], Floats (&n2)[n]) {
  Words bits[n], exponent[n];
  Floats t[n], p[n], radius[n], a[n], z[n], sine[n], cosine[n];
  FASTDIFF_EACH bits[j] = (Words)from_unsigned(i1[j] | 1u);
  FASTDIFF_EACH exponent[j] = (bits[j] - philox::kSqrtHalf) & 0xFF800000u;
  FASTDIFF_EACH t[j] = (Floats)(bits[j] - exponent[j]) - 1.0f;
  FASTDIFF_EACH p[j] = fill(philox::kLog[0]);
#pragma GCC unroll 8
  for (int k = 1; k < 8; ++k) FASTDIFF_EACH p[j] = fused(p[j], t[j], fill(philox::kLog[k]));
  FASTDIFF_EACH radius[j] = __builtin_convertvector((Ints)exponent[j], Floats);
  FASTDIFF_EACH radius[j] = fused(radius[j], fill(philox::kLogOfExponent), fill(philox::kLogOfScale));
  FASTDIFF_EACH radius[j] = fused(p[j], t[j], radius[j]);
  FASTDIFF_EACH radius[j] = root(larger(radius[j], fill(philox::kSmallest)));

  FASTDIFF_EACH a[j] = (Floats)((i2[j] >> 9) + 0x3F800000u) - 1.5f;
  FASTDIFF_EACH z[j] = a[j] * a[j];
  FASTDIFF_EACH sine[j] = fill(philox::kSin[0]);
  FASTDIFF_EACH cosine[j] = fill(philox::kCos[0]);
#pragma GCC unroll 2
  for (int k = 1; k < 3; ++k) FASTDIFF_EACH {
      sine[j] = fused(sine[j], z[j], fill(philox::kSin[k]));
      cosine[j] = fused(cosine[j], z[j], fill(philox::kCos[k]));
    }
  FASTDIFF_EACH cosine[j] = fused(cosine[j], z[j], fill(philox::kCos[3]));
  FASTDIFF_EACH sine[j] = a[j] * sine[j];
  FASTDIFF_EACH n1[j] = (Floats)((Words)(radius[j] * (cosine[j] - sine[j])) ^ (i2[j] << 31));
  FASTDIFF_EACH n2[j] = (Floats)((Words)(radius[j] * (cosine[j] + sine[j])) ^ ((i2[j] << 30) & 0x80000000u));
}

// Normals of n * kGroups groups from `group` on, in order of their elements.
template <int n>
FASTDIFF_INLINE void normal_chains(uint64_t seed, uint32_t stream, uint64_t sample, uint32_t group, float* out) {
  // Interleaving works within 128-bit parts. So that the results come out in order, the lanes of the first and the
  // second 64 bits of each part hold the lower and the upper half of the groups.
  Longs order;
#pragma GCC unroll 8
  for (int k = 0; k < kGroups; ++k) order[k] = uint64_t(k / 2 + (k % 2) * (kGroups / 2));
  Longs c[n][4];
  FASTDIFF_EACH {
    c[j][0] = order + uint64_t(group + uint32_t(j) * kGroups);
    c[j][1] = Longs{} + stream;
    c[j][2] = Longs{} + uint32_t(sample);
    c[j][3] = Longs{} + (sample >> 32);
  }
  philox_rounds(c, seed);
  Words i1[n], i2[n];
  FASTDIFF_EACH i1[j] = low_halves(c[j][0], c[j][2]);
  FASTDIFF_EACH i2[j] = low_halves(c[j][1], c[j][3]);
  Floats n1[n], n2[n];
  box_muller(i1, i2, n1, n2);
  FASTDIFF_EACH {
    store(out + j * kNormals, zip_low(n1[j], n2[j]));
    store(out + j * kNormals + kNormals / 2, zip_high(n1[j], n2[j]));
  }
}

#undef FASTDIFF_EACH

// Normals of `vectors` * kGroups groups.
FASTDIFF_APART inline void normal_groups(uint64_t seed, uint32_t stream, uint64_t sample, uint32_t group, int vectors, float* out) {
  int v = 0;
  for (; v + kChains <= vectors; v += kChains)
    normal_chains<kChains>(seed, stream, sample, group + uint32_t(v * kGroups), out + v * kNormals);
  for (; v < vectors; ++v) normal_chains<1>(seed, stream, sample, group + uint32_t(v * kGroups), out + v * kNormals);
}

// Elements [element, element + count) of a sample, count <= kBlock. Writes up to kSlack floats beyond the end.
inline void normal_elements(uint64_t seed, uint32_t stream, uint64_t sample, uint64_t element, int count, float* out) {
  const uint64_t next = ((element >> 34) + 1) << 34;  // where the groups reach the next 2^32, and another stream
  if (element + uint64_t(count) > next) {
    const int before = int(next - element);
    normal_elements(seed, stream, sample, element, before, out);
    return normal_elements(seed, stream, sample, next, count - before, out + before);
  }
  stream = philox::stream_of(stream, element / 4);
  const int skip = int(element % 4);
  const uint32_t group = uint32_t(element / 4);
  const int vectors = (skip + count + kNormals - 1) / kNormals;
  if (skip == 0) {
    normal_groups(seed, stream, sample, group, vectors, out);
  } else {
    alignas(64) float whole[kBlock + 2 * kSlack];
    normal_groups(seed, stream, sample, group, vectors, whole);
    memcpy(out, whole + skip, sizeof(float) * size_t(count));
  }
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
