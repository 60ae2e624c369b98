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

// The words stay in 64-bit lanes. A product looks only at the low half of a lane, so the high halves of the words,
// which hold what is left of earlier products, need no clearing.
FASTDIFF_INLINE void philox_rounds(Longs& c0, Longs& c1, Longs& c2, Longs& c3, uint64_t seed) {
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < philox::kRounds; ++round) {
    const Longs product0 = product(c0, Longs{} + philox::kMultiplier0);
    const Longs product1 = product(c2, Longs{} + philox::kMultiplier1);
    c0 = (product1 >> 32) ^ c1 ^ (Longs{} + k0);
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ (Longs{} + k1);
    c3 = product0;
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

// Normals of `vectors` * kGroups groups from `group` on, in order of their elements.
inline void normal_groups(uint64_t seed, uint32_t stream, uint64_t sample, uint32_t group, int vectors, float* out) {
  // Interleaving works within 128-bit parts. So that the results come out in order, the lanes of the first and the
  // second 64 bits of each part hold the lower and the upper half of the groups.
  Longs order;
  for (int k = 0; k < kGroups; ++k) order[k] = uint64_t(k / 2 + (k % 2) * (kGroups / 2));
  for (int v = 0; v < vectors; ++v, group += kGroups, out += kNormals) {
    Longs c0 = order + group, c1 = Longs{} + stream, c2 = Longs{} + uint32_t(sample), c3 = Longs{} + (sample >> 32);
    philox_rounds(c0, c1, c2, c3, seed);
    const Words i1 = (Words)((c0 & 0xFFFFFFFFull) | (c2 << 32)), i2 = (Words)((c1 & 0xFFFFFFFFull) | (c3 << 32));
    Floats n1, n2;
    box_muller(i1, i2, n1, n2);
    store(out, zip_low(n1, n2));
    store(out + kNormals / 2, zip_high(n1, n2));
  }
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
