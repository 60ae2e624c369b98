// Elements as they lie in memory, and blocks of them. A kernel is a template of the types that its operands are stored
// in; it computes in float or double and converts in registers. Where memory holds just those types, it gets the memory
// itself; other memory, and the end of a row that fills no vector, goes through a buffer.
#pragma once

#include "arguments.h"
#include "simd.h"
#include "work.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

struct Bfloat {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The dtype of a stored type, and what is computed in: float for all but double.
template <class S>
struct Storage;
template <>
struct Storage<float> {
  static constexpr DType kCode = DType::f32;
  typedef float Compute;
};
template <>
struct Storage<double> {
  static constexpr DType kCode = DType::f64;
  typedef double Compute;
};
template <>
struct Storage<Bfloat> {
  static constexpr DType kCode = DType::bf16;
  typedef float Compute;
};
template <>
struct Storage<Half> {
  static constexpr DType kCode = DType::f16;
  typedef float Compute;
};
template <class S>
constexpr DType kCode = Storage<S>::kCode;
template <class S>
using Compute = typename Storage<S>::Compute;

FASTDIFF_INLINE float from_bfloat16(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// To the nearest, ties to even. AVX512_BF16 has an instruction for it, which turns subnormal numbers into zeros.
FASTDIFF_INLINE uint16_t to_bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? uint16_t(0x7FC0u) : uint16_t(rounded);
}

FASTDIFF_INLINE float from_half_bits(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = h & 0x7FFFu;
  uint32_t bits;
  if (rest >= 0x7C00u) {
    bits = 0x7F800000u | (rest << 13) | (rest > 0x7C00u ? 0x400000u : 0u);  // inf, or NaN made quiet
  } else if (rest >= 0x0400u) {
    bits = (rest << 13) + (112u << 23);
  } else {
    const float value = float(rest) * 0x1p-24f;  // subnormal in float16, exact here
    memcpy(&bits, &value, 4);
  }
  bits |= sign;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

FASTDIFF_INLINE uint16_t to_half_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7FFFFFFFu;
  if (bits > 0x7F800000u) return uint16_t(sign | 0x7E00u | ((bits >> 13) & 0x3FFu));
  if (bits >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // from 65520 on it rounds to inf
  if (bits < 0x38800000u) {
    // Subnormal: adding 1/2 leaves 24 bits below it, which is the spacing, and the addition rounds.
    float size;
    memcpy(&size, &bits, 4);
    size += 0.5f;
    memcpy(&bits, &size, 4);
    return uint16_t(sign | (bits - 0x3F000000u));
  }
  bits += 0xFFFu + ((bits >> 13) & 1u);
  return uint16_t(sign | ((bits - (112u << 23)) >> 13));
}

// In bits 16 to 31, as to_bfloat16; what is below does not matter.
FASTDIFF_INLINE Words round_to_bfloat16(Floats x) {
  const Words bits = (Words)x, half = ((bits >> 16) & 1u) + 0x7FFFu;
#if defined(FASTDIFF_AVX512)
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_ORD_Q);
  return (Words)_mm512_mask_add_epi32(_mm512_set1_epi32(0x7FC00000), number, (__m512i)bits, (__m512i)half);
#else
  return x == x ? bits + half : Words{} + 0x7FC00000u;
#endif
}

#if defined(FASTDIFF_AVX512)

FASTDIFF_INLINE Floats load(const Half* from) {
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
}
FASTDIFF_INLINE void store(Half* to, Floats value) {
  _mm256_storeu_si256((__m256i*)to, _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
}

#elif defined(FASTDIFF_AVX2)

FASTDIFF_INLINE Floats load(const Half* from) {
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
}
FASTDIFF_INLINE void store(Half* to, Floats value) {
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
}

#else

FASTDIFF_INLINE Floats load(const Half* from) {
  Floats value;
  for (int k = 0; k < kWidth<float>; ++k) value[k] = from_half_bits(from[k].bits);
  return value;
}
FASTDIFF_INLINE void store(Half* to, Floats value) {
  for (int k = 0; k < kWidth<float>; ++k) to[k].bits = to_half_bits(value[k]);
}

#endif

// Two vectors' worth of elements. Those of Bfloat, and what is computed with them, are split into the even and the odd
// ones: each is then a shift or a mask away from memory, and nothing has to cross lanes.
template <class V>
struct Two {
  V a, b;
};
template <class D>
constexpr bool kSplit = false;
template <>
constexpr bool kSplit<Bfloat> = true;

FASTDIFF_INLINE Two<Floats> split(Two<Floats> x) {
  Ints even;
  for (int k = 0; k < kWidth<float>; ++k) even[k] = 2 * k;
  return {__builtin_shuffle(x.a, x.b, even), __builtin_shuffle(x.a, x.b, even + 1)};
}

FASTDIFF_INLINE Two<Floats> unsplit(Two<Floats> x) {
  Ints low;
  for (int k = 0; k < kWidth<float>; ++k) low[k] = k / 2 + k % 2 * kWidth<float>;
  return {__builtin_shuffle(x.a, x.b, low), __builtin_shuffle(x.a, x.b, low + kWidth<float> / 2)};
}

// In the order of D.
template <class D, class S>
FASTDIFF_INLINE Two<Vector<Compute<S>>> load_two(const S* from) {
  static_assert(2 * kWidth<Compute<S>> <= kStep, "two vectors must fit into the padding");
  if constexpr (kSplit<S>) {
    static_assert(kSplit<D>, "only computed with its own kind");
    Words bits;
    memcpy(&bits, from, sizeof(bits));
    return {(Floats)(bits << 16), (Floats)(bits & 0xFFFF0000u)};
  } else {
    const Two<Vector<Compute<S>>> x = {load(from), load(from + kWidth<Compute<S>>)};
    if constexpr (kSplit<D>)
      return split(x);
    else
      return x;
  }
}

template <class D>
FASTDIFF_INLINE void store_two(D* to, Two<Vector<Compute<D>>> x) {
  if constexpr (kSplit<D>) {
    const Words bits = (round_to_bfloat16(x.a) >> 16) | (round_to_bfloat16(x.b) & 0xFFFF0000u);
    memcpy(to, &bits, sizeof(bits));
  } else {
    store(to, x.a);
    store(to + kWidth<Compute<D>>, x.b);
  }
}

// Calls body(k) for every two vectors of a block of `count` elements.
template <class C, class Body>
FASTDIFF_INLINE void for_twos(int count, Body body) {
  for (int k = 0; k < count; k += 2 * kWidth<C>) body(k);
}

FASTDIFF_INLINE float single(Bfloat x) { return from_bfloat16(x.bits); }
FASTDIFF_INLINE float single(Half x) { return from_half_bits(x.bits); }
FASTDIFF_INLINE void assign(Bfloat& to, float value) { to.bits = to_bfloat16(value); }
FASTDIFF_INLINE void assign(Half& to, float value) { to.bits = to_half_bits(value); }

template <class S>
inline void read_narrow(const S* from, int count, float* to) {
  constexpr int kTwo = 2 * kWidth<float>;
  int k = 0;
  for (; k + kTwo <= count; k += kTwo) {
    const Two<Floats> x = load_two<S>(from + k);
    store_two(to + k, kSplit<S> ? unsplit(x) : x);
  }
  for (; k < count; ++k) to[k] = single(from[k]);
}

template <class S>
inline void write_narrow(const float* from, int count, S* to) {
  constexpr int kTwo = 2 * kWidth<float>;
  int k = 0;
  for (; k + kTwo <= count; k += kTwo) store_two(to + k, load_two<S>(from + k));
  for (; k < count; ++k) assign(to[k], from[k]);
}

template <class S>
inline void read_narrow(const S* from, int count, double* to) {
  float singles[kBlock];
  read_narrow(from, count, singles);
  for (int k = 0; k < count; ++k) to[k] = double(singles[k]);
}

// By way of float32, as PyTorch does.
template <class S>
inline void write_narrow(const double* from, int count, S* to) {
  float singles[kBlock];
  for (int k = 0; k < count; ++k) singles[k] = float(from[k]);
  write_narrow(singles, count, to);
}

// u / 127.5 - 1 of a byte, with the bits of two rounded operations: 1 / 127.5 is two parts, a byte times the first is
// exact, and the sum of both products is rounded once. fastdiff/tensors.py has the same numbers.
FASTDIFF_INLINE float decoded(uint8_t u) {
  return (float(u) * 0x1.01p-7f + float(u) * 0x1.010102p-23f) - 1.0f;
}

// Elements [start, start + count) of `from`; count <= kBlock.
template <class C>
FASTDIFF_APART void read(const Input& from, int64_t start, int count, C* to) {
  switch (from.dtype) {
    case DType::f32: {
      const float* source = (const float*)from.data + start;
      for (int k = 0; k < count; ++k) to[k] = C(source[k]);
      break;
    }
    case DType::f64: {
      const double* source = (const double*)from.data + start;
      for (int k = 0; k < count; ++k) to[k] = C(source[k]);
      break;
    }
    case DType::bf16:
      read_narrow((const Bfloat*)from.data + start, count, to);
      break;
    case DType::f16:
      read_narrow((const Half*)from.data + start, count, to);
      break;
    case DType::u8: {
      const uint8_t* source = (const uint8_t*)from.data + start;
      for (int k = 0; k < count; ++k) to[k] = C(decoded(source[k]));
      break;
    }
  }
}

template <class C>
FASTDIFF_APART void write(const C* from, int count, const Output& to, int64_t start) {
  switch (to.dtype) {
    case DType::f32: {
      float* target = (float*)to.data + start;
      for (int k = 0; k < count; ++k) target[k] = float(from[k]);
      break;
    }
    case DType::f64: {
      double* target = (double*)to.data + start;
      for (int k = 0; k < count; ++k) target[k] = double(from[k]);
      break;
    }
    case DType::bf16:
      write_narrow(from, count, (Bfloat*)to.data + start);
      break;
    case DType::f16:
      write_narrow(from, count, (Half*)to.data + start);
      break;
    case DType::u8:
      break;  // never an output: the binding refuses it
  }
}

FASTDIFF_INLINE int padded(int count) { return (count + kStep - 1) & ~(kStep - 1); }

// Only what is computed in can be a buffer for memory of another type; Bfloat and Half are for memory of just that.
template <class S>
constexpr bool kComputed = sizeof(S) >= 4;

// A block of `from`, zeros behind it up to a multiple of kStep: memory itself, or `buffer`.
template <class S>
FASTDIFF_INLINE const S* view(const Input& from, int64_t start, int count, S* buffer) {
  const S* memory = (const S*)from.data + start;
  if (from.dtype == kCode<S> && count % kStep == 0) return memory;
  if constexpr (kComputed<S>)
    read(from, start, count, buffer);
  else
    memcpy(buffer, memory, sizeof(S) * size_t(count));
  memset(buffer + count, 0, sizeof(S) * size_t(padded(count) - count));
  return buffer;
}

// Where to put a block of results: memory itself, or `buffer`, which commit() then takes to memory, past the caches if
// the output is streamed.
template <class S>
FASTDIFF_INLINE S* place(const Output& to, int64_t start, int count, S* buffer) {
  return to.dtype == kCode<S> && count % kStep == 0 && !to.streamed ? (S*)to.data + start : buffer;
}

// Copies past the caches what fills vectors of memory; what is before the first and behind the last goes through them.
FASTDIFF_INLINE void stream(void* to, const void* from, size_t bytes) {
  char* target = (char*)to;
  const char* source = (const char*)from;
#if defined(__x86_64__)
  const size_t before = -(uintptr_t)target % kBytes;
  if (before < bytes) {
    memcpy(target, source, before);
    target += before, source += before, bytes -= before;
    for (; bytes >= kBytes; target += kBytes, source += kBytes, bytes -= kBytes) {
#if defined(FASTDIFF_AVX512)
      _mm512_stream_si512((__m512i*)target, _mm512_loadu_si512(source));
#elif defined(FASTDIFF_AVX2)
      _mm256_stream_si256((__m256i*)target, _mm256_loadu_si256((const __m256i*)source));
#else
      _mm_stream_si128((__m128i*)target, _mm_loadu_si128((const __m128i*)source));
#endif
    }
  }
#endif
  memcpy(target, source, bytes);
}

template <class S>
FASTDIFF_INLINE void commit(const Output& to, int64_t start, int count, const S* values) {
  S* memory = (S*)to.data + start;
  if (to.dtype == kCode<S> && memory == values) return;
  if (to.dtype == kCode<S> && to.streamed) return stream(memory, values, sizeof(S) * size_t(count));
  if constexpr (kComputed<S>)
    write(values, count, to, start);
  else
    memcpy(memory, values, sizeof(S) * size_t(count));
}

// Copies words [start, start + count) of data that lies in another order between its memory and `packed`, where they are
// side by side.
template <size_t size, bool gather>
FASTDIFF_APART void move_words(const Strides& at, int64_t start, int64_t count, char* memory, char* packed) {
  const auto move = [](char* one, char* other) __attribute__((always_inline)) {
    memcpy(gather ? other : one, gather ? one : other, size);
  };
  const int last = at.dims - 1;
  const int64_t run = at.sizes[last], step = at.strides[last] * int64_t(size);
  int64_t index[kMaxDims], place = 0;
  for (int d = last; d >= 0; --d) {
    index[d] = start % at.sizes[d];
    start /= at.sizes[d];
    place += index[d] * at.strides[d];
  }
  while (count > 0) {
    char* const from = memory + place * int64_t(size);
    int d = last;
    int64_t moved;
    if (run == 2 && last > 0 && index[last] == 0 && count >= 2) {  // pairs, as many as lie behind each other
      --d;
      const int64_t pairs = at.sizes[d] - index[d], next = at.strides[d] * int64_t(size);
      moved = pairs < count / 2 ? pairs : count / 2;
      for (int64_t k = 0; k < moved; ++k) {
        move(from + k * next, packed + 2 * k * int64_t(size));
        move(from + k * next + step, packed + (2 * k + 1) * int64_t(size));
      }
      packed += 2 * moved * int64_t(size);
      count -= 2 * moved;
    } else {
      moved = run - index[last] < count ? run - index[last] : count;
      for (int64_t k = 0; k < moved; ++k) move(from + k * step, packed + k * int64_t(size));
      packed += moved * int64_t(size);
      count -= moved;
    }
    index[d] += moved;
    place += moved * at.strides[d];
    for (; d > 0 && index[d] == at.sizes[d]; --d) {
      place += at.strides[d - 1] - at.sizes[d] * at.strides[d];
      index[d] = 0;
      ++index[d - 1];
    }
  }
}

// Elements [start, start + count), which are whole words.
template <bool gather>
inline void move_elements(const Order& order, DType dtype, int64_t start, int count, void* memory, void* packed) {
  const int64_t first = start / order.word, words = count / order.word;
  const int size = (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2) * order.word;
  char *const one = (char*)memory, *const other = (char*)packed;
  if (size == 2) return move_words<2, gather>(order.at, first, words, one, other);
  if (size == 4) return move_words<4, gather>(order.at, first, words, one, other);
  if (size == 8) return move_words<8, gather>(order.at, first, words, one, other);
  move_words<16, gather>(order.at, first, words, one, other);
}

// A block as it is stored, its elements in order.
struct Packed {
  alignas(64) char bytes[kBlock * sizeof(double)];
};

// view(), place() and commit() of data that may lie in another order.
template <class S>
FASTDIFF_INLINE const S* view(const Input& from, const Order& order, int64_t start, int count, S* buffer, Packed& packed) {
  if (!order.at.dims) return view(from, start, count, buffer);
  move_elements<true>(order, from.dtype, start, count, (void*)from.data, packed.bytes);
  return view(Input{packed.bytes, from.dtype}, 0, count, buffer);
}

template <class S>
FASTDIFF_INLINE S* place(const Output& to, const Order& order, int64_t start, int count, S* buffer) {
  return order.at.dims ? buffer : place(to, start, count, buffer);
}

template <class S>
FASTDIFF_INLINE void commit(const Output& to, const Order& order, int64_t start, int count, const S* values, Packed& packed) {
  if (!order.at.dims) return commit(to, start, count, values);
  commit(Output{packed.bytes, to.dtype, false}, 0, count, values);
  move_elements<false>(order, to.dtype, start, count, to.data, packed.bytes);
}

// Calls kernel(D{}, N{}) for data in `data` and noise in `noise`: the types stored, where there are kernels of them,
// otherwise the compute type C twice.
template <class C, class Kernel>
FASTDIFF_INLINE void for_storage(DType data, DType noise, Kernel kernel) {
  if constexpr (sizeof(C) == 4) {
    if (data == DType::bf16 && noise == DType::bf16) return kernel(Bfloat{}, Bfloat{});
    if (data == DType::bf16 && noise == DType::f32) return kernel(Bfloat{}, float{});
#if defined(FASTDIFF_AVX512) || defined(FASTDIFF_AVX2)
    if (data == DType::f16 && noise == DType::f16) return kernel(Half{}, Half{});
    if (data == DType::f16 && noise == DType::f32) return kernel(Half{}, float{});
#endif
  }
  kernel(C{}, C{});
}

// The dtype of all that are there, or u8, for which there is no kernel.
template <class... Operands>
FASTDIFF_INLINE DType common(DType dtype, const Operands&... others) {
  return ((!others.data || others.dtype == dtype) && ...) ? dtype : DType::u8;
}

template <class C>
FASTDIFF_INLINE C at(const Rows& rows, int64_t row) {
  return ((const C*)rows.data)[row * rows.stride];
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
