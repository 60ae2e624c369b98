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

// How many vectors are worked on side by side: a chain of ten rounds leaves a processor waiting, several do not.
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

FASTDIFF_INLINE void box_muller(Words i1, Words i2, Floats& n1, Floats& n2) {
  const Words bits = (Words)from_unsigned(i1 | 1u);
  const Words exponent = (bits - philox::kSqrtHalf) & 0xFF800000u;
  const Floats t = (Floats)(bits - exponent) - 1.0f;
  const Floats whole = __builtin_convertvector((Ints)exponent, Floats);
  const Floats y = fused(polynomial(t, philox::kLog), t,
                         fused(whole, fill(philox::kLogOfExponent), fill(philox::kLogOfScale)));
  const Floats radius = root(y > philox::kSmallest ? y : fill(philox::kSmallest));

  const Floats a = (Floats)((i2 >> 9) + 0x3F800000u) - 1.5f;
  const Floats z = a * a;
  const Floats sine = a * polynomial(z, philox::kSin), cosine = polynomial(z, philox::kCos);
  n1 = (Floats)((Words)(radius * (cosine - sine)) ^ (i2 << 31));
  n2 = (Floats)((Words)(radius * (cosine + sine)) ^ ((i2 >> 1) << 31));
}

// Normals of `chains` * kGroups groups from `group` on, in order of their elements.
template <int chains>
FASTDIFF_INLINE void normal_chains(uint64_t seed, uint32_t stream, uint64_t sample, uint32_t group, float* out) {
  // Interleaving works within 128-bit parts. So that the results come out in order, the lanes of the first and the
  // second 64 bits of each part hold the lower and the upper half of the groups.
  Longs order;
#pragma GCC unroll 8
  for (int k = 0; k < kGroups; ++k) order[k] = uint64_t(k / 2 + (k % 2) * (kGroups / 2));
  Longs c[chains][4];
#pragma GCC unroll 4
  for (int j = 0; j < chains; ++j) {
    c[j][0] = order + uint64_t(group + uint32_t(j) * kGroups);
    c[j][1] = Longs{} + stream;
    c[j][2] = Longs{} + uint32_t(sample);
    c[j][3] = Longs{} + (sample >> 32);
  }
  philox_rounds(c, seed);
#pragma GCC unroll 4
  for (int j = 0; j < chains; ++j) {
    const Words i1 = (Words)((c[j][0] & 0xFFFFFFFFull) | (c[j][2] << 32));
    const Words i2 = (Words)((c[j][1] & 0xFFFFFFFFull) | (c[j][3] << 32));
    Floats n1, n2;
    box_muller(i1, i2, n1, n2);
    store(out + j * kNormals, zip_low(n1, n2));
    store(out + j * kNormals + kNormals / 2, zip_high(n1, n2));
  }
}

// Normals of `vectors` * kGroups groups.
inline void normal_groups(uint64_t seed, uint32_t stream, uint64_t sample, uint32_t group, int vectors, float* out) {
  int v = 0;
  for (; v + kChains <= vectors; v += kChains)
    normal_chains<kChains>(seed, stream, sample, group + uint32_t(v * kGroups), out + v * kNormals);
  for (; v < vectors; ++v) normal_chains<1>(seed, stream, sample, group + uint32_t(v * kGroups), out + v * kNormals);
}

// Elements [element, element + count) of a sample, count <= kBlock. Writes up to kSlack floats beyond the end.
inline void normal_elements(uint64_t seed, uint32_t stream, uint64_t sample, uint64_t element, int count, float* out) {
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
