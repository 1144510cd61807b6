// What keys, values, queries and weights are multiplied as.
//
// A *pack* is as many neighbours along the dimension that is summed over as one instruction adds up: two bfloat16, or one
// float. A Line is kLanes packs. Keys lie as packs of features and values as packs of tokens (see attention_cache.h), so
// that a Line is read as it lies, and lane by lane gets its own sum: no sum over lanes is ever needed.
#pragma once

#include <cstring>

#include "simd.h"

namespace {

template <class T>
constexpr int kPack = sizeof(float) / sizeof(T);

template <class T>
struct Packed;

template <>
struct Packed<float> {
  using Operand = float;  // what queries and weights are held as, to be multiplied with keys and values of this type
  using Line = Vec;
  static Line load(const float* p) { return ::load(p); }
  static Line load(const float* p, int64_t n) { return ::load(p, n); }  // the first n packs, and zeros
  static Line without_second(Line line) { return line; }
  static Line repeat(const Operand* p) { return broadcast(*p); }  // one pack in all lanes
  static Vec dot(Line a, Line b, Vec c) { return fma(a, b, c); }  // c + the sum over each pack of a b
};

#if defined(__AVX512BF16__)

template <>
struct Packed<bf16> {
  using Operand = bf16;
  using Line = __m512bh;
  static Line load(const bf16* p) { return reinterpret_cast<Line>(_mm512_loadu_si512(p)); }
  static Line load(const bf16* p, int64_t n) { return reinterpret_cast<Line>(_mm512_maskz_loadu_epi32(first(n), p)); }
  static Line without_second(Line line) {
    return reinterpret_cast<Line>(_mm512_and_si512(reinterpret_cast<__m512i>(line), _mm512_set1_epi32(0xFFFF)));
  }
  static Line repeat(const Operand* p) {
    int32_t pack;
    std::memcpy(&pack, p, sizeof(pack));
    return reinterpret_cast<Line>(_mm512_set1_epi32(pack));
  }
  static Vec dot(Line a, Line b, Vec c) { return _mm512_dpbf16_ps(c, a, b); }
};

#else

template <>
struct Packed<bf16> {
  using Operand = float;
  struct Line {
    Vec first, second;
  };
#if defined(__AVX512F__)
  static Line unpack(__m512i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(0xFFFF0000)))};
  }
  static Line load(const bf16* p) { return unpack(_mm512_loadu_si512(p)); }
  static Line load(const bf16* p, int64_t n) { return unpack(_mm512_maskz_loadu_epi32(::first(n), p)); }
#else
  static Line unpack(__m256i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(0xFFFF0000)))};
  }
  static Line load(const bf16* p) { return unpack(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Line load(const bf16* p, int64_t n) {
    return unpack(_mm256_maskload_epi32(reinterpret_cast<const int*>(p), ::first(n)));
  }
#endif
  static Line without_second(Line line) { return {line.first, zero()}; }
  static Line repeat(const Operand* p) { return {broadcast(p[0]), broadcast(p[1])}; }
  static Vec dot(Line a, Line b, Vec c) { return fma(a.second, b.second, fma(a.first, b.first, c)); }
};

#endif

// The first n lanes of v, and `other` in the rest.
inline Vec first_or(Vec v, int64_t n, Vec other) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps(first(n), other, v);
#else
  return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(first(n)));
#endif
}

}  // namespace
