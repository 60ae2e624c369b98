// Blocks between memory, in any dtype, and buffers in the compute dtype. The kernels see nothing but compute dtypes;
// where memory holds just that, they get the memory itself and nothing is copied.
#pragma once

#include "arguments.h"
#include "simd.h"
#include "work.h"

namespace fastdiff {
namespace FASTDIFF_VARIANT {

template <class C>
constexpr DType kCode = sizeof(C) == 4 ? DType::f32 : DType::f64;

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

// A little faster than what the compiler makes of the plain loops, which do the rest.
inline void read_bfloats(const uint16_t* from, int count, float* to) {
  int k = 0;
#if defined(FASTDIFF_AVX512)
  for (; k + 16 <= count; k += 16)
    _mm512_storeu_si512(to + k, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(from + k))), 16));
#elif defined(FASTDIFF_AVX2)
  for (; k + 8 <= count; k += 8)
    _mm256_storeu_si256((__m256i*)(to + k),
                        _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(from + k))), 16));
#endif
  for (; k < count; ++k) to[k] = from_bfloat16(from[k]);
}

#if defined(FASTDIFF_AVX512)
FASTDIFF_INLINE __m256i to_bfloats(const float* from) {
  const __m512 value = _mm512_loadu_ps(from);
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7FFF)), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
}
#elif defined(FASTDIFF_AVX2)
FASTDIFF_INLINE __m256i to_bfloat_words(const float* from) {
  const __m256 value = _mm256_loadu_ps(from);
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7FFF)), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
}
FASTDIFF_INLINE __m256i to_bfloats(const float* from) {
  const __m256i packed = _mm256_packus_epi32(to_bfloat_words(from), to_bfloat_words(from + 8));
  return _mm256_permute4x64_epi64(packed, 0xD8);  // packing works within 128-bit parts
}
#endif

inline void write_bfloats(const float* from, int count, uint16_t* to) {
  int k = 0;
#if defined(FASTDIFF_AVX512) || defined(FASTDIFF_AVX2)
  for (; k + 16 <= count; k += 16) _mm256_storeu_si256((__m256i*)(to + k), to_bfloats(from + k));
#endif
  for (; k < count; ++k) to[k] = to_bfloat16(from[k]);
}

inline void read_halves(const uint16_t* from, int count, float* to) {
  int k = 0;
#if defined(FASTDIFF_AVX512)
  for (; k + 16 <= count; k += 16)
    _mm512_storeu_ps(to + k, _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + k))));
#elif defined(FASTDIFF_AVX2)
  for (; k + 8 <= count; k += 8) _mm256_storeu_ps(to + k, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + k))));
#endif
  for (; k < count; ++k) to[k] = from_half_bits(from[k]);
}

inline void write_halves(const float* from, int count, uint16_t* to) {
  int k = 0;
#if defined(FASTDIFF_AVX512)
  for (; k + 16 <= count; k += 16)
    _mm256_storeu_si256((__m256i*)(to + k), _mm512_cvtps_ph(_mm512_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT));
#elif defined(FASTDIFF_AVX2)
  for (; k + 8 <= count; k += 8)
    _mm_storeu_si128((__m128i*)(to + k), _mm256_cvtps_ph(_mm256_loadu_ps(from + k), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; k < count; ++k) to[k] = to_half_bits(from[k]);
}

// Elements [start, start + count) of `from`; count <= kBlock.
template <class C>
inline void read(const Input& from, int64_t start, int count, C* to) {
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
    case DType::f16: {
      const uint16_t* source = (const uint16_t*)from.data + start;
      const auto read_narrow = from.dtype == DType::bf16 ? read_bfloats : read_halves;
      if constexpr (sizeof(C) == 4) {
        read_narrow(source, count, to);
      } else {
        float narrow[kBlock];
        read_narrow(source, count, narrow);
        for (int k = 0; k < count; ++k) to[k] = C(narrow[k]);
      }
      break;
    }
    case DType::u8: {
      const uint8_t* source = (const uint8_t*)from.data + start;
      for (int k = 0; k < count; ++k) to[k] = C(source[k]);
      break;
    }
  }
}

FASTDIFF_INLINE int padded(int count) { return (count + kLanes - 1) & ~(kLanes - 1); }

// A block of `from` to compute on, zeros behind it up to a multiple of kLanes: memory itself, or `buffer`.
template <class C>
FASTDIFF_INLINE const C* view(const Input& from, int64_t start, int count, C* buffer) {
  if (from.dtype == kCode<C> && count % kLanes == 0) return (const C*)from.data + start;
  read(from, start, count, buffer);
  for (int k = count; k < padded(count); ++k) buffer[k] = C(0);
  return buffer;
}

// Where to put a block of results: memory itself, or `buffer`, which commit() then takes to memory.
template <class C>
FASTDIFF_INLINE C* place(const Output& to, int64_t start, int count, C* buffer) {
  return to.dtype == kCode<C> && count % kLanes == 0 ? (C*)to.data + start : buffer;
}

template <class C>
inline void commit(const Output& to, int64_t start, int count, const C* values) {
  switch (to.dtype) {
    case DType::f32: {
      float* target = (float*)to.data + start;
      if ((const void*)target == (const void*)values) return;
      for (int k = 0; k < count; ++k) target[k] = float(values[k]);
      break;
    }
    case DType::f64: {
      double* target = (double*)to.data + start;
      if ((const void*)target == (const void*)values) return;
      for (int k = 0; k < count; ++k) target[k] = double(values[k]);
      break;
    }
    case DType::bf16:
    case DType::f16: {
      uint16_t* target = (uint16_t*)to.data + start;
      const auto write_narrow = to.dtype == DType::bf16 ? write_bfloats : write_halves;
      if constexpr (sizeof(C) == 4) {
        write_narrow(values, count, target);
      } else {
        // By way of float32, as PyTorch does.
        float narrow[kBlock];
        for (int k = 0; k < count; ++k) narrow[k] = float(values[k]);
        write_narrow(narrow, count, target);
      }
      break;
    }
    case DType::u8:
      break;  // never an output: the binding refuses it
  }
}

template <class C>
FASTDIFF_INLINE C at(const Rows& rows, int64_t row) {
  return ((const C*)rows.data)[row * rows.stride];
}

}  // namespace FASTDIFF_VARIANT
}  // namespace fastdiff
