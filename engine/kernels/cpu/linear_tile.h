// What the linear kernels do in one step along K, and the tile of outputs that is held in registers.
//
// An output is a dot product along K = in_features. Lane l of its accumulator adds up the products that fall to lane l
// of each step, in the order of K, and the lanes are added as sum_of_lanes adds them. That is so whatever tile an
// output is computed in, so its bits depend on its row of w and its token alone.
#pragma once

#include "simd.h"
#include "weight_stream.h"

namespace {

// For weights of type T: how many elements of K a step takes (kStep), a step of a row of w as it is loaded (Weights), a
// step of a token as it is packed beforehand (Tokens), and the products of the two, added to an accumulator.
template <class T>
struct Arithmetic;

template <>
struct Arithmetic<float> {
  static constexpr int64_t kStep = kLanes;
  using Weights = Vec;
  using Tokens = Vec;

  static Weights load_weights(const float* w) { return load(w); }
  static Weights load_weights(const float* w, int64_t n) { return load(w, n); }
  static Tokens load_tokens(const float* x, int64_t n) { return load(x, n); }
  static Vec accumulate(Vec sum, Weights w, Tokens x) { return fma(w, x, sum); }
};

#if defined(__AVX512BF16__)

template <>
struct Arithmetic<bf16> {
  static constexpr int64_t kStep = 32;
  using Weights = __m512bh;
  using Tokens = __m512bh;

  static Weights load_weights(const bf16* w) { return reinterpret_cast<__m512bh>(_mm512_loadu_si512(w)); }
  static Weights load_weights(const bf16* w, int64_t n) {
    const __mmask32 mask = n >= kStep ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return reinterpret_cast<__m512bh>(_mm512_maskz_loadu_epi16(mask, w));
  }
  static Tokens load_tokens(const bf16* x, int64_t n) { return load_weights(x, n); }
  static Vec accumulate(Vec sum, Weights w, Tokens x) { return _mm512_dpbf16_ps(sum, w, x); }
};

#else

// Two elements lie in the 32 bits of a lane: the first in the lower half, the second in the upper. Each becomes a float
// by itself: the one shifted up, the other with the lower half cleared.
struct Pairs {
  Vec first;
  Vec second;
};

template <>
struct Arithmetic<bf16> {
  static constexpr int64_t kStep = 2 * kLanes;
  using Weights = Pairs;
  using Tokens = Pairs;

#if defined(__AVX512F__)
  static Pairs split(__m512i bits) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xFFFF0000))))};
  }
  static Pairs load_weights(const bf16* w) { return split(_mm512_loadu_si512(w)); }
  static Pairs load_weights(const bf16* w, int64_t n) {
    const __mmask32 mask = n >= kStep ? ~__mmask32{0} : (__mmask32{1} << n) - 1;
    return split(_mm512_maskz_loadu_epi16(mask, w));
  }
#else
  static Pairs split(__m256i bits) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(bits, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(bits, _mm256_set1_epi32(static_cast<int>(0xFFFF0000))))};
  }
  static Pairs load_weights(const bf16* w) { return split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))); }
  static Pairs load_weights(const bf16* w, int64_t n) {
    if (n >= kStep) return load_weights(w);
    bf16 some[kStep] = {};
    std::memcpy(some, w, n * sizeof(bf16));
    return load_weights(some);
  }
#endif
  static Pairs load_tokens(const bf16* x, int64_t n) { return load_weights(x, n); }
  static Vec accumulate(Vec sum, const Pairs& w, const Pairs& x) {
    return fma(w.second, x.second, fma(w.first, x.first, sum));
  }
};

#endif

#if defined(__AVX512F__)
inline __m128 sum_of_quarters(Vec v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  return _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
}
#else
inline __m128 sum_of_quarters(Vec v) { return _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1)); }
#endif

// sum_of_lanes of each of four accumulators.
inline __m128 sums_of_lanes(Vec a, Vec b, Vec c, Vec d) {
  const __m128 p = sum_of_quarters(a), q = sum_of_quarters(b), r = sum_of_quarters(c), s = sum_of_quarters(d);
  const __m128 pq = _mm_add_ps(_mm_movelh_ps(p, q), _mm_movehl_ps(q, p));
  const __m128 rs = _mm_add_ps(_mm_movelh_ps(r, s), _mm_movehl_ps(s, r));
  return _mm_add_ps(_mm_shuffle_ps(pq, rs, 0x88), _mm_shuffle_ps(pq, rs, 0xDD));
}

template <int N>
void add_lanes(float* sums, const Vec* vectors) {
  int i = 0;
  for (; i + 4 <= N; i += 4) {
    const __m128 four = sums_of_lanes(vectors[i], vectors[i + 1], vectors[i + 2], vectors[i + 3]);
    _mm_storeu_ps(sums + i, four);
  }
  for (; i < N; ++i) sums[i] = sum_of_lanes(vectors[i]);
}

// sums[t * R + r] = the dot product of row r of w and token t.
//
// w: R rows, `stride` elements apart. x: packed, the N tokens' parts of a step beside one another.
template <class T, int R, int N, class A = Arithmetic<T>>
void tile(float* sums, const T* w, int64_t stride, const typename A::Tokens* x, int64_t in_features, Fetch fetch) {
  Vec sum[N][R];
  for (int t = 0; t < N; ++t)
    for (int r = 0; r < R; ++r) sum[t][r] = zero();
  int64_t k = 0;
  for (; k + A::kStep <= in_features; k += A::kStep, x += N) {
    fetch.step();
    typename A::Weights weights[R];
    for (int r = 0; r < R; ++r) weights[r] = A::load_weights(w + r * stride + k);
    for (int t = 0; t < N; ++t)
      for (int r = 0; r < R; ++r) sum[t][r] = A::accumulate(sum[t][r], weights[r], x[t]);
  }
  if (k < in_features) {
    for (int r = 0; r < R; ++r) {
      const typename A::Weights weights = A::load_weights(w + r * stride + k, in_features - k);
      for (int t = 0; t < N; ++t) sum[t][r] = A::accumulate(sum[t][r], weights, x[t]);
    }
  }
  add_lanes<R * N>(sums, &sum[0][0]);
}

}  // namespace
