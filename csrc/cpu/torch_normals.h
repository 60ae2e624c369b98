// What torch.randn draws on the CPU, to the bit: words of the Mersenne twister MT19937 (Matsumoto and Nishimura 1998), 24
// bits of each as a uniform, and in chunks of sixteen a Box-Muller transform of the first eight with the last eight, its
// logarithm, sine and cosine by Cephes' single-precision polynomials. Which products and sums are one rounding is
// PyTorch's compiler's doing: it was found by comparing, and is compared again before it is used (torch_randn.py).
#pragma once

#include "storage.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

namespace twister {

constexpr int kWords = kTwisterWords, kGap = 397;
constexpr int kGenerations = 5;  // what is kept in the first-level cache: a generation is the words between two twists

// A run of words: the state at the beginning, and what follows from it.
struct Sequence {
  alignas(64) uint32_t words[(kGenerations + 1) * kWords];
  int made;      // how many there are
  int position;  // the first that was not drawn
};

FASTDIFF_INLINE Words load_words(const uint32_t* from) {
  Words value;
  memcpy(&value, from, kBytes);
  return value;
}

// Word n + 624 follows from the words n, n + 1 and n + 397, so a vector is made at a time without any edge.
FASTDIFF_APART inline void twist(uint32_t* words) {
  constexpr int W = kWidth<float>;
  static_assert(kWords % W == 0 && kGap + W <= kWords, "a vector of words follows from words that are there");
  for (int n = 0; n < kWords; n += W) {
    const Words first = load_words(words + n), second = load_words(words + n + 1);
    const Words mixed = (first & 0x80000000u) | (second & 0x7FFFFFFFu);
    const Words odd = Words{} - (second & 1u);
    store(words + n + kWords, load_words(words + n + kGap) ^ (mixed >> 1) ^ (odd & 0x9908B0DFu));
  }
}

// More words after those that are there; of those, the last generation and what was not drawn stay.
inline void extend(Sequence& s) {
  if (s.made == (kGenerations + 1) * kWords) {
    memcpy(s.words, s.words + kGenerations * kWords, sizeof(uint32_t) * kWords);
    s.made = kWords;
    s.position -= kGenerations * kWords;
  }
  twist(s.words + s.made - kWords);
  s.made += kWords;
}

FASTDIFF_INLINE Words temper(Words y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9D2C5680u;
  y ^= (y << 15) & 0xEFC60000u;
  return (y ^ (y >> 18)) & 0x00FFFFFFu;  // 24 bits are used
}

// Chunks of sixteen are two halves: a vector of first halves and one of last halves are made a pair of normals each.
constexpr int kHalf = 8;

#if defined(FASTDIFF_AVX512)
FASTDIFF_INLINE Words load_halves(const uint32_t* from, int half, int vector) {
  const uint32_t* at = from + 32 * vector + kHalf * half;
  const __m512i low = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)at));
  return (Words)_mm512_inserti64x4(low, _mm256_loadu_si256((const __m256i*)(at + 16)), 1);
}
FASTDIFF_INLINE void store_halves(float* to, int half, int vector, Floats x) {
  float* at = to + 32 * vector + kHalf * half;
  _mm256_storeu_ps(at, _mm512_castps512_ps256((__m512)x));
  _mm256_storeu_ps(at + 16, _mm512_extractf32x8_ps((__m512)x, 1));
}
#else
constexpr int kParts = kHalf / kWidth<float>;
FASTDIFF_INLINE Words load_halves(const uint32_t* from, int half, int vector) {
  return load_words(from + 16 * (vector / kParts) + kHalf * half + kWidth<float> * (vector % kParts));
}
FASTDIFF_INLINE void store_halves(float* to, int half, int vector, Floats x) {
  store(to + 16 * (vector / kParts) + kHalf * half + kWidth<float> * (vector % kParts), x);
}
#endif

#define FASTDIFF_EACH _Pragma("GCC unroll 8") for (int j = 0; j < n; ++j)

constexpr float kLog[] = {7.0376836292e-2f,  -1.1514610310e-1f, 1.1676998740e-1f,  -1.2420140846e-1f, 1.4249322787e-1f,
                          -1.6668057665e-1f, 2.0000714765e-1f,  -2.4999993993e-1f, 3.3333331174e-1f};
constexpr float kCos[] = {2.443315711809948e-5f, -1.388731625493765e-3f, 4.166664568298827e-2f};
constexpr float kSin[] = {-1.9515295891e-4f, 8.3321608736e-3f, -1.6666654611e-1f};
constexpr uint32_t kSqrtHalf = 0x3F3504F3u;

// n vectors of first halves and of last halves: 2 * n * kWidth normals from as many words. Scalings by powers of two
// are folded into constants, which changes no rounding.
template <int n>
FASTDIFF_INLINE void transform(const uint32_t* words, float* out) {
  Floats t[n], e[n], z[n], p[n], radius[n];
  Words bits[n], exponent[n];
  // radius = sqrt(-2 log(1 - u)): 1 - u = 2^e (1 + t), t from sqrt(1/2) - 1 to sqrt(2) - 1.
  FASTDIFF_EACH t[j] = __builtin_convertvector((Ints)temper(load_halves(words, 0, j)), Floats);
  FASTDIFF_EACH bits[j] = (Words)(1.0f - t[j] * 0x1p-24f);
  FASTDIFF_EACH exponent[j] = (bits[j] - kSqrtHalf) & 0xFF800000u;
  FASTDIFF_EACH t[j] = (Floats)(bits[j] - exponent[j]) - 1.0f;
  FASTDIFF_EACH e[j] = __builtin_convertvector((Ints)exponent[j], Floats);
  FASTDIFF_EACH z[j] = t[j] * t[j];
  FASTDIFF_EACH p[j] = fill(kLog[0]);
#pragma GCC unroll 8
  for (int k = 1; k < 9; ++k) FASTDIFF_EACH p[j] = fused(p[j], t[j], fill(kLog[k]));
  FASTDIFF_EACH p[j] = fused(p[j] * t[j], z[j], e[j] * (-2.12194440e-4f * 0x1p-23f));
  FASTDIFF_EACH p[j] = fused(z[j], fill(-0.5f), p[j]);
  FASTDIFF_EACH radius[j] = fused(e[j], fill(0.693359375f * 0x1p-23f), t[j] + p[j]);
  FASTDIFF_EACH radius[j] = root(radius[j] * -2.0f);

  // theta = 2 pi u, less a multiple of pi / 4 that leaves it between -pi / 4 and pi / 4.
  Floats a[n], sine[n], cosine[n];
  Ints octant[n];
  FASTDIFF_EACH a[j] = __builtin_convertvector((Ints)temper(load_halves(words, 1, j)), Floats) * (6.2831855f * 0x1p-24f);
  FASTDIFF_EACH octant[j] = (__builtin_convertvector(a[j] * 1.27323954473516f, Ints) + 1) & ~1;
  FASTDIFF_EACH e[j] = __builtin_convertvector(octant[j], Floats);
  FASTDIFF_EACH a[j] = fused(e[j], fill(-0.78515625f), a[j]);
  FASTDIFF_EACH a[j] = fused(e[j], fill(-2.4187564849853515625e-4f), a[j]);
  FASTDIFF_EACH a[j] = fused(e[j], fill(-3.77489497744594108e-8f), a[j]);
  FASTDIFF_EACH z[j] = a[j] * a[j];
  FASTDIFF_EACH cosine[j] = fill(kCos[0]);
  FASTDIFF_EACH sine[j] = fill(kSin[0]);
#pragma GCC unroll 2
  for (int k = 1; k < 3; ++k) FASTDIFF_EACH {
      cosine[j] = fused(cosine[j], z[j], fill(kCos[k]));
      sine[j] = fused(sine[j], z[j], fill(kSin[k]));
    }
  FASTDIFF_EACH cosine[j] = fused(cosine[j] * z[j], z[j], z[j] * -0.5f) + 1.0f;
  FASTDIFF_EACH sine[j] = fused(sine[j] * z[j], a[j], a[j]);
  // The octants change sine with cosine, and signs. A sum with zero takes the sign from a zero, as PyTorch's scaling by
  // a standard deviation of 1 and shift by a mean of 0 does.
  FASTDIFF_EACH {
    const Ints swapped = (octant[j] & 2) != 0;
    const Floats of_sine = (Floats)(swapped ? (Ints)cosine[j] : (Ints)sine[j]);
    const Floats of_cosine = (Floats)(swapped ? (Ints)sine[j] : (Ints)cosine[j]);
    const Words sine_sign = (Words)(octant[j] & 4) << 29, cosine_sign = (Words)((octant[j] + 2) & 4) << 29;
    store_halves(out, 0, j, radius[j] * (Floats)((Words)of_cosine ^ cosine_sign) + 0.0f);
    store_halves(out, 1, j, radius[j] * (Floats)((Words)of_sine ^ sine_sign) + 0.0f);
  }
}

#undef FASTDIFF_EACH

constexpr int kVectors = kWidth<float> == 16 ? 8 : 4;           // pairs of vectors side by side
constexpr int kChunks = 2 * kVectors * kWidth<float> / 16;  // the chunks that they hold

FASTDIFF_APART inline void transform_chunks(const uint32_t* words, int chunks, float* out) {
  int c = 0;
  for (; c + kChunks <= chunks; c += kChunks) transform<kVectors>(words + 16 * c, out + 16 * c);
  if (c < chunks) {
    alignas(64) uint32_t rest[16 * kChunks] = {};
    alignas(64) float normals[16 * kChunks];
    memcpy(rest, words + 16 * c, sizeof(uint32_t) * 16 * size_t(chunks - c));
    transform<kVectors>(rest, normals);
    memcpy(out + 16 * c, normals, sizeof(float) * 16 * size_t(chunks - c));
  }
}

// Draw `count` words without using them.
inline void skip(Sequence& s, int64_t count) {
  while (s.made - s.position < count) {
    count -= s.made - s.position;
    s.position = s.made;
    extend(s);
  }
  s.position += int(count);
}

// Draw 16 * chunks words, and write their normals.
inline void draw_chunks(Sequence& s, int64_t chunks, float* out) {
  while (chunks) {
    int64_t there = (s.made - s.position) / 16;
    if (there >= chunks) {
      there = chunks;
    } else if (there % kChunks) {
      there -= there % kChunks;  // the others are taken with those to come
    }
    if (there) {
      transform_chunks(s.words + s.position, int(there), out);
      s.position += int(16 * there);
      out += 16 * there;
      chunks -= there;
    }
    if (chunks) extend(s);
  }
}

// The same, rounded to bfloat16 or float16: count is a multiple of 16, at most kBlock.
template <class S>
inline void draw_rounded(Sequence& s, int count, float* out) {
  S narrow[kBlock];
  draw_chunks(s, count / 16, out);
  write_narrow(out, count, narrow);
  read_narrow(narrow, count, out);
}

FASTDIFF_APART inline void draw_block(Sequence& s, DType dtype, int count, float* out) {
  if (dtype == DType::bf16) return draw_rounded<Bfloat>(s, count, out);
  if (dtype == DType::f16) return draw_rounded<Half>(s, count, out);
  draw_chunks(s, count / 16, out);
}

// To memory of the dtype of `to`, from element `start` on.
inline void draw_to(Sequence& s, int64_t chunks, const Output& to, int64_t start) {
  if (to.dtype == DType::f32) return draw_chunks(s, chunks, (float*)to.data + start);
  alignas(64) float block[kBlock];
  for (int64_t done = 0; done < chunks;) {
    const int64_t part = chunks - done < kBlock / 16 ? chunks - done : kBlock / 16;
    draw_chunks(s, part, block);
    write(block, int(16 * part), to, start + 16 * done);
    done += part;
  }
}

// The sequence from chunk `first` on.
inline void start(Sequence& s, const TorchNormalArguments& a, int64_t first) {
  for (int k = 0; k < kWords; ++k) s.words[k] = uint32_t(a.state[k]);
  s.made = kWords;
  s.position = a.position;
  skip(s, 16 * first);
}

// Leaves the state behind the last word that was drawn.
inline void finish(const Sequence& s, const TorchNormalArguments& a) {
  const int before = (s.position - 1) / kWords * kWords;
  for (int k = 0; k < kWords; ++k) a.state_after[k] = s.words[before + k];
  *a.position_after = s.position - before;
}

}  // namespace twister

// The chunks of 16 [begin, end); who has the last goes on to the end, and leaves the state that follows.
inline void torch_normal_chunks(const TorchNormalArguments& a, int64_t begin, int64_t end) {
  twister::Sequence s;
  twister::start(s, a, begin);
  const Output to = {a.out, a.dtype, false};
  twister::draw_to(s, end - begin, to, 16 * begin);
  if (end != a.elements / 16) return;
  const int64_t rest = a.elements % 16;
  if (rest) {
    // The last sixteen elements are drawn anew, those of the last whole chunk among them.
    twister::skip(s, rest);
    twister::draw_to(s, 1, to, a.elements - 16);
  }
  twister::finish(s, a);
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
